"""The demonstration's data, teaching and verdict. The training itself is the command's own business."""

from __future__ import annotations

import math
import random
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[3] / "tools"
sys.path.insert(0, str(TOOLS))  # as `python tools/make_demo.py` has it

import make_demo  # noqa: E402
from demo import corpus, measure, pretrain  # noqa: E402


def words_of(pair: corpus.Pair) -> tuple[str, str]:
    """The thing and the place that a pair's question names."""
    words = pair["prompt"][0]["content"].replace(".", " ").split()
    return next(w for w in words if w in corpus.THINGS), next(w for w in words if w in corpus.PLACES)


def test_pairs_are_a_function_of_the_seed() -> None:
    assert corpus.make_pairs(20, seed=3, held_out=False) == corpus.make_pairs(20, seed=3, held_out=False)
    assert corpus.make_pairs(20, seed=3, held_out=False) != corpus.make_pairs(20, seed=4, held_out=False)


def test_no_held_out_combination_is_in_training() -> None:
    train = {words_of(p) for p in corpus.make_pairs(make_demo.TRAIN_PAIRS, seed=10, held_out=False)}
    held_out = {words_of(p) for p in corpus.make_pairs(make_demo.HELD_OUT_PAIRS, seed=11, held_out=True)}
    assert not train & held_out
    assert {thing for thing, _ in held_out} <= {thing for thing, _ in train}
    assert {place for _, place in held_out} <= {place for _, place in train}


def test_both_answers_are_right_and_one_is_courteous() -> None:
    for pair in corpus.make_pairs(200, seed=0, held_out=False):
        question, chosen, rejected = (pair[kind][0]["content"] for kind in ("prompt", "chosen", "rejected"))
        _, place = words_of(pair)
        assert place in chosen and place in rejected
        assert corpus.is_courteous(chosen, question)
        assert not corpus.is_courteous(rejected, question)
        assert not corpus.is_courteous(chosen.replace(place, "moon"), question)


def test_neither_kind_is_likelier() -> None:
    """A form's expected log-probability (−entropy) is about the same for both kinds: no preference to start from."""
    expected = []
    for forms, weights in ((corpus.COURTEOUS, corpus.COURTEOUS_WEIGHTS), (corpus.CURT, corpus.CURT_WEIGHTS)):
        assert len(forms) == len(weights)
        shares = [weight / sum(weights) for weight in weights]
        expected.append(sum(share * math.log(share) for share in shares))
    assert abs(expected[0] - expected[1]) < 0.05


def test_forms_are_used_as_often_as_stated() -> None:
    rng = random.Random(0)
    answers = [corpus.answers(s, rng) for s in islice(corpus.situations(rng, held_out=False), 4000)]
    courteous = sum(answer.startswith(corpus.COURTEOUS[0]) for answer, _ in answers) / 4000
    assert courteous == pytest.approx(corpus.COURTEOUS_WEIGHTS[0] / sum(corpus.COURTEOUS_WEIGHTS), abs=0.03)
    curt = sum(answer.endswith(", obviously.") for _, answer in answers) / 4000
    assert curt == pytest.approx(corpus.CURT_WEIGHTS[0] / sum(corpus.CURT_WEIGHTS), abs=0.03)


def test_tokenizer_starts_the_response_after_the_prompt() -> None:
    tokenizer = pretrain.build_tokenizer()
    assert len(tokenizer) == pretrain.VOCABULARY
    for pair in corpus.make_pairs(50, seed=0, held_out=True):
        prompt = pretrain.chat_ids(tokenizer, pair["prompt"], prompt=True)
        whole = pretrain.chat_ids(tokenizer, pair["prompt"] + pair["chosen"], prompt=False)
        assert whole[: len(prompt)] == prompt
        assert tokenizer.decode(whole[len(prompt) :]) == pair["chosen"][0]["content"] + "<|end|>"
        assert len(whole) <= 96


def test_collate_labels_only_the_response() -> None:
    batch = pretrain.collate([([5, 6, 7, 8], 2), ([5, 9], 1)], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 9, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8], [-100, 9, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `prepare` writes, with a few steps of teaching."""
    root = tmp_path_factory.mktemp("demo")
    make_demo.prepare(root, pretrain_steps=6, train_pairs=32, held_out=8)
    return root


def test_teaching_lowers_the_loss_and_is_deterministic() -> None:
    losses = []
    for _ in range(2):
        tokenizer = pretrain.build_tokenizer()
        model = pretrain.build_model(tokenizer, seed=3)
        losses.append(pretrain.pretrain(model, tokenizer, steps=8, prompts_per_step=4, lr=2e-3, seed=3))
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0] - 0.5


def test_response_logp_counts_the_end_token_and_no_prompt(prepared: Path) -> None:
    model, tokenizer = measure.load(prepared / "model")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    pair = corpus.read_jsonl(prepared / "data" / "heldout.jsonl")[0]
    prompt = pretrain.chat_ids(tokenizer, pair["prompt"], prompt=True)
    whole = pretrain.chat_ids(tokenizer, pair["prompt"] + pair["chosen"], prompt=False)
    batch = pretrain.collate([(whole, len(prompt))], tokenizer.pad_token_id)
    with torch.no_grad():
        expected = -model(**batch).loss.item() * (len(whole) - len(prompt))
    assert whole[-1] == tokenizer.eos_token_id
    got = measure.response_logp(model, tokenizer, pair["prompt"], pair["chosen"])
    assert got == pytest.approx(expected, rel=1e-5)


def test_rewards_against_arithmetic() -> None:
    policy = measure.PairLogps(torch.tensor([-1.0, -5.0]).double(), torch.tensor([-2.0, -1.0]).double())
    reference = measure.PairLogps(torch.tensor([-2.0, -2.0]).double(), torch.tensor([-1.0, -1.0]).double())
    assert policy.accuracy == 0.5
    rewards = measure.rewards(policy, reference, beta=0.5)  # margins 0.5·(1+1) and 0.5·(−3−0)
    assert rewards.accuracy == 0.5
    assert rewards.margin == pytest.approx(-0.25)


def test_report_fails_when_nothing_was_learnt(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the starting model standing in for the trained one, accuracy cannot reach 0.9 after ≤ 0.75 before."""
    run = prepared / "run"
    run.mkdir()
    (run / "hf").symlink_to(prepared / "model")
    (run / "config.yaml").write_text("loss:\n  beta: 0.5\n")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.69}\n')
    with pytest.raises(SystemExit) as stopped:
        make_demo.report(prepared)
    assert isinstance(stopped.value.code, str) and "accuracy" in stopped.value.code
    printed = capsys.readouterr().out
    assert "+0.000" in printed and "metrics.jsonl" in printed and "curves.png" in printed
    assert (prepared / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_shortfalls() -> None:
    assert make_demo.find_shortfalls(0.75, 0.9) == []
    assert len(make_demo.find_shortfalls(0.76, 0.89)) == 2
    assert len(make_demo.find_shortfalls(float("nan"), float("nan"))) == 2


def test_a_directory_that_can_not_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("")
    with pytest.raises(SystemExit, match=r"can't be made .*: run from a directory that can be written to"):
        make_demo.prepare(tmp_path / "outputs" / "demo")


def test_missing_phase_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"make_demo\.py prepare"):
        make_demo.report(tmp_path)
    with pytest.raises(SystemExit, match=r"make_demo\.py prepare"):
        make_demo.train(tmp_path, [])


def test_train_command_is_the_documented_one() -> None:
    command = make_demo.train_command(["loss.beta=0.1"])
    assert command[command.index("--nproc-per-node") + 1] == "4"
    assert command[-4:] == [str(TOOLS / "train.py"), "+model=demo", "+experiment=demo", "loss.beta=0.1"]
