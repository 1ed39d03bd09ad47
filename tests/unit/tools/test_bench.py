"""The benchmark's parts: its arithmetic, what it measures on, and that all contenders compute the same numbers."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from rich.console import Console

from megadpo.config.choices import ReferenceMode
from megadpo.data.batch import build_batch
from megadpo.data.tokenization import TokenizedPair
from megadpo.errors import DataError, MegaDPOError
from megadpo.models.hf_config import read_architecture
from tests.helpers.launch import launch
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import write_jsonl

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools"))  # as `python tools/bench/dpo.py` has it

from bench import report, tables
from bench.ablation_patches import padded_batch
from bench.ablations import ABLATIONS
from bench.contenders import Contender, Turn, take_turns
from bench.dpo import parse
from bench.job import Job
from bench.matmul_child import products, response_share
from bench.measure import LAYOUTS, RIVALS, Bench, Entry, reference_modes
from bench.proc import busy_cpu_seconds, cpu_seconds, high_water_bytes
from bench.report import Gate, Result
from bench.workload import Shape, Workload, prompt_heavy_pairs, read_pairs, texts_of, write_model, write_workload

from tests.helpers.jobs import bench as bench_jobs

SHAPE = Shape(hidden=32, intermediate=48, layers=2, heads=4, kv_heads=2, vocab=300)
MAX_LENGTH = 160
STEPS = 3


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    root = tmp_path_factory.mktemp("bench")
    pairs = read_pairs(write_jsonl(root / "all.jsonl", make_pairs(16, 0, conversational=True)))
    write_model(root / "model", SHAPE, texts_of(pairs))
    return write_workload(root / "pairs", root / "model", pairs, pairs_per_step=3, max_length=MAX_LENGTH)


def job(workload: Workload, out: Path, **changes: Any) -> Job:
    return Job(
        model=str(workload.model),
        pairs=str(workload.pairs),
        tokens=str(workload.tokens),
        out=str(out),
        pairs_per_step=workload.pairs_per_step,
        max_length=MAX_LENGTH,
        lr=1e-3,
        beta=0.1,
        dtype="fp32",
        device="cpu",
        threads=1,
        **changes,
    )


def result(name: str, seconds: Sequence[float], **changes: Any) -> Result:
    steps = len(seconds)
    values: dict[str, Any] = {
        "losses": [0.5] * steps,
        "grad_norms": [2.0] * steps,
        "flops": [100] * steps,
        "tokens": [1000] * steps,
        "mfu": None,
        "matmul_rates": [50.0] * steps,
        "reference_logps": {0: (-10.0, -20.0)},
        "pairs_per_step": 8,
        "peak_bytes": 2**30,
        "warmup": 1,
    }
    return Result(name=name, seconds=seconds, **{**values, **changes})


# What it measures on


def test_workload_holds_the_pairs_that_everyone_keeps_in_whole_steps(workload: Workload) -> None:
    rows = [json.loads(line) for line in workload.pairs.read_text().splitlines()]
    ids = json.loads(workload.tokens.read_text())
    assert workload.read == 16 and workload.kept < 16
    assert len(rows) == len(ids) == len(workload.lengths) == workload.kept // 3 * 3
    assert [tuple(map(len, pair)) for pair in ids] == list(workload.lengths)
    longest = [prompt + max(chosen, rejected) for prompt, chosen, rejected in workload.lengths]
    assert max(longest) == MAX_LENGTH and workload.truncated == sum(length == MAX_LENGTH for length in longest) > 0
    assert workload.lengths_of(workload.steps_per_epoch) == workload.lengths[:3]
    assert workload.step_tokens(0) == sum(2 * p + c + r for p, c, r in workload.lengths[:3])


def test_too_few_pairs_for_a_step_are_an_error(workload: Workload, tmp_path: Path) -> None:
    pairs = read_pairs(workload.pairs)[:2]
    with pytest.raises(DataError, match="2 of 2 pairs are kept at max_length 160, a step takes 3"):
        write_workload(tmp_path / "pairs", workload.model, pairs, pairs_per_step=3, max_length=MAX_LENGTH)


def test_prompt_heavy_pairs_have_prompts_four_times_their_responses(workload: Workload) -> None:
    for pair in prompt_heavy_pairs(read_pairs(workload.pairs), 5, words=10):
        prompt, chosen, rejected = (len(text.split()) for text in texts_of([pair]))
        assert prompt == 4 * chosen == 4 * rejected > 0


def test_products_are_those_that_the_flop_rates_count(workload: Workload) -> None:
    arch = read_architecture(workload.model)
    *layers, head = products(arch, rows=1, response_rows=1)
    assert sum(layer.times * layer.flops for layer in layers) == arch.flop_rates.per_token
    assert head.flops == arch.flop_rates.per_response_token
    lengths = np.array(workload.lengths)
    assert response_share(workload.tokens) == pytest.approx(lengths[:, 1:].sum() / lengths.sum())


def test_padded_batch_scores_what_a_packed_one_scores() -> None:
    rng = np.random.default_rng(0)
    sizes = [(3, 2, 5), (1, 4, 1), (6, 1, 2)]
    pairs = [TokenizedPair(i, *(rng.integers(1, 99, n, dtype=np.int32) for n in own)) for i, own in enumerate(sizes)]
    padded = padded_batch(pairs, num_tokens=0, pad_token_id=0, share_prompt=False)
    packed = build_batch(pairs, num_tokens=37, pad_token_id=0, share_prompt=False)
    assert padded.plan.num_tokens == padded.tokens_1T.numel() == 6 * 8
    for name in ("targets_N", "sequence_index_N", "response_tokens_S"):
        assert torch.equal(getattr(padded, name), getattr(packed, name)), name
    for name in ("tokens_1T", "positions_T"):
        theirs = [getattr(batch, name).view(-1)[batch.response_rows_N] for batch in (padded, packed)]
        assert torch.equal(*theirs), name


# What contenders compute


def test_contenders_and_ablations_compute_the_same(workload: Workload, tmp_path: Path) -> None:
    # The other rows combine the same parts.
    rows = ("padded", "packed", "+ response rows", "+ cached reference")
    found = {
        name: launch(1, bench_jobs.answers, "megadpo", job(workload, tmp_path / str(i), ablation=name), STEPS)[0]
        for i, name in enumerate(rows)
    }
    found["trl"] = launch(1, bench_jobs.answers, "trl", job(workload, tmp_path / "trl"), STEPS)[0]
    naive = bench_jobs.answers("naive", job(workload, tmp_path / "naive"), STEPS)
    assert len({round(answer["loss"], 3) for answer in naive}) == STEPS  # it trains
    for name, answers in found.items():
        for own, theirs in zip(answers, naive, strict=True):
            assert own["loss"] == pytest.approx(theirs["loss"], abs=1e-5), name
            assert own["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), name
            assert own["seconds"] > 0
        if name != "trl":
            assert all(0 < answer["time/reference_s"] < answer["seconds"] for answer in answers)
            logps = naive[-1]["reference_logps"]
            assert len(logps) == STEPS * workload.pairs_per_step
            for pair, logp in logps.items():
                assert answers[-1]["reference_logps"][pair] == pytest.approx(logp, rel=1e-4), (name, pair)


def test_contenders_take_turns_in_processes_of_their_own(workload: Workload, tmp_path: Path) -> None:
    bench = Bench(template=job(workload, tmp_path), scratch=tmp_path, turns=2, warmup=1, one_by_one=False)
    entries = [RIVALS["naive"], Entry(name="matmul", module="matmul_child")]
    lineup = bench.run("two of them", entries, workload)
    naive = lineup["naive"]
    assert [r.name for r in lineup.results] == ["naive"] and len(naive.seconds) == len(naive.matmul_rates) == 3
    assert naive.peak_bytes > 50 * 2**20
    assert naive.matmul_share > 0 and lineup.matmul_by_layer.keys() == {"qkv", "proj", "fc1", "fc2", "head"}
    assert naive.losses[0] == pytest.approx(np.log(2)) and naive.losses[1] != naive.losses[0]
    assert len(naive.reference_logps) == 9 and 0 <= lineup.foreign_cpu <= 1
    console = Console(record=True, width=200)
    console.print(tables.rival_table("rivals", lineup.results, naive))
    assert "naive" in console.export_text()


def test_a_contender_that_dies_is_named_with_its_last_words(workload: Workload, tmp_path: Path) -> None:
    with (
        Contender("ghost", "no_such_child", job(workload, tmp_path / "ghost")) as contender,
        pytest.raises(MegaDPOError, match=r"ghost ended by itself(.|\n)*no_such_child"),
    ):
        contender.wait_until_ready()


class Understudy:
    """Stands in for a contender's processes; `played` has the job and the steps of each."""

    played: ClassVar[list[tuple[Job, int]]]

    def __init__(self, name: str, module: str, job: Job, *, world_size: int) -> None:
        self.job = job
        self.turns: list[Turn] = []

    def __enter__(self) -> Understudy:
        return self

    def __exit__(self, *_: object) -> None:
        self.played.append((self.job, len(self.turns)))

    def step(self) -> None:
        values = {"loss": 0.5, "grad_norm": 1.0, "time/reference_s": 0.5}
        self.turns.append(Turn(2.0, values))

    def wait_until_ready(self) -> None: ...

    def peak_bytes(self) -> int:
        return 7

    def cpu_seconds(self) -> float:
        return 0.0

    def logged(self, start: str) -> list[str]:
        return []


def test_what_is_kept_on_disk_is_there_before_the_turns(
    workload: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.measure.Contender", Understudy)
    monkeypatch.setattr("bench.measure.take_turns", lambda contenders, **_: [c.step() for c in contenders])
    Understudy.played = []
    bench = Bench(template=job(workload, tmp_path), scratch=tmp_path, turns=1, warmup=0, one_by_one=False)
    entry = Entry(name="cached", overrides=("a=1",), rehearsed=True)
    (cached,) = bench.run("modes", [entry], workload).results
    (rehearsed, steps), (measured, counted) = Understudy.played
    assert (steps, counted) == (workload.steps_per_epoch, 1)
    assert rehearsed.out != measured.out and rehearsed.overrides == measured.overrides == ("a=1",)
    assert cached.reference_share == 0.25


class Player:
    """Stands in for a contender."""

    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.said, self.turns = name, said, [_Turn()]

    def step(self) -> None:
        self.said.append(self.name)


class _Turn:
    seconds = 1.0


def test_the_order_of_turns_is_reversed_each_time_and_some_sit_out() -> None:
    said: list[str] = []
    players: Any = [Player(name, said) for name in "abc"]
    take_turns(players, turns=4, every={"b": 3}, title="")
    assert "".join(said) == "abc" + "ca" + "ac" + "cba"


def test_proc_tells_memory_and_time() -> None:
    before = cpu_seconds(os.getpid()), busy_cpu_seconds()
    while cpu_seconds(os.getpid()) - before[0] < 0.05:
        sum(range(100_000))
    assert busy_cpu_seconds() > before[1]
    assert high_water_bytes(os.getpid()) > 10 * 2**20


# Arithmetic


def test_figures_leave_the_warm_up_out() -> None:
    own = result("megadpo", [9.0, 1.0, 2.0, 4.0])
    assert own.step_seconds == 2.0
    assert own.pairs_per_s == pytest.approx(3 * 8 / 7)
    assert own.tokens_per_s == pytest.approx(3000 / 7)
    assert own.flop_rate == pytest.approx(300 / 7)
    assert own.matmul_share == pytest.approx(100 / 2 / 50)


def test_ratios_are_medians_over_the_steps_that_both_have_done() -> None:
    own = result("megadpo", [9.0, 1.0, 2.0, 4.0])
    rival = result("trl", [1.0, 5.0, 12.0], flops=[150, 150, 300])
    assert report.time_ratio(rival, own) == 5.5
    assert report.flop_ratio(rival, own) == 2.0
    assert report.to_row_before([own, rival]) == [None, 5.5]


def test_differences_are_the_largest_ones() -> None:
    own = result("a", [1, 1, 1])
    other = result(
        "b", [1, 1], losses=[0.5, 0.75], grad_norms=[2.0, 2.5], reference_logps={0: (-10.0, -21.0), 1: (0.0, 1.0)}
    )
    assert report.loss_difference(other, own) == 0.25
    assert report.grad_norm_difference(other, own) == 0.25
    assert report.logp_difference(other, own) == pytest.approx(0.05)
    assert report.logp_difference(result("trl", [1], reference_logps={}), own) is None


def test_gates_compare_with_the_rivals_that_took_part() -> None:
    own = result("megadpo", [1, 1, 1])
    naive = result("naive", [1, 1.2, 1.2], peak_bytes=2**29)
    trl = result("trl", [4, 4.9], losses=[0.5, 0.5 + 2e-5])
    held = {gate.what: gate.holds for gate in report.rival_gates([own, naive, trl])}
    assert held == {
        "share of the matmul rate": True,
        "pairs/s over the naive rival's (goal 1.3)": True,
        "peak memory over the naive rival's": False,
        "pairs/s over TRL's": False,
        "loss, from naive's": True,
        "loss, from trl's": False,
    }
    assert len(report.rival_gates([own])) == 1


def test_gates_of_sharing_layouts_and_ablations() -> None:
    shared = result("prompts shared", [1, 1])
    twice = result("prompts twice", [1, 1.1], flops=[126, 126])
    gates = report.sharing_gates({"the pairs": (twice, shared), report.PROMPT_HEAVY: (twice, shared)})
    assert [(gate.bound, gate.holds) for gate in gates] == [(pytest.approx(0.85 * 1.26), True), (1.3, False)]
    layouts = [result(entry.name, [1, seconds]) for entry, seconds in zip(LAYOUTS, (2, 1, 1.6), strict=True)]
    assert [gate.holds for gate in report.layout_gates(layouts)] == [True, False]
    off = replace(shared, grad_norms=[2.0, 2.1])
    assert [gate.holds for gate in report.ablation_gates([shared, twice, off])] == [True, False]


def test_every_reference_mode_takes_part(tmp_path: Path) -> None:
    entries = reference_modes(tmp_path)
    assert [entry.name for entry in entries] == list(ReferenceMode)
    assert all(f"reference.mode={entry.name}" in entry.overrides for entry in entries)


def test_gates_of_reference_modes() -> None:
    def mode(name: str, seconds: float, peak_mib: int, reference_s: float, loss: float = 0.5) -> Result:
        return result(
            name,
            [9, seconds, seconds],
            peak_bytes=peak_mib * 2**20,
            reference_seconds=[5, reference_s, reference_s],
            losses=[loss] * 3,
        )

    resident = mode("resident", 1.0, 300, 0.25)
    offload = mode("offload", 1.1, 310, 0.3, loss=0.6)
    cached, none = mode("cached", 0.75, 260, 0.01), mode("none", 0.7, 261, 0.0, loss=1.5)
    peaks = {"resident": 300, "offload": 310, "cached": 260, "none": 261}
    gates = report.reference_gates([resident, offload, cached, none], peaks, weights=40)
    assert [gate.holds for gate in gates] == [True, False, True, True, False, True]
    slow = report.reference_gates([resident, mode("cached", 0.85, 260, 0.02)], peaks, weights=0)
    assert [gate.holds for gate in slow] == [True, False, False, True]
    assert report.reference_gates([resident], peaks, weights=0) == []
    console = Console(record=True, width=200)
    console.print(tables.reference_table("references", [resident, cached], resident))
    said = console.export_text()
    assert all(text in said for text in ("25.0%", "-40", "0.75", "0.0e+00"))


def test_a_busy_machine_holds_nothing() -> None:
    assert report.quiet_gate({"rivals": 0.03, "layouts": 0.1}).holds
    assert not report.quiet_gate({"rivals": 0.03, "layouts": 0.5}).holds


def test_nan_holds_nothing() -> None:
    assert not Gate("loss", float("nan"), 1e-5, at_most=True).holds
    assert not Gate("rate", float("nan"), 0.6).holds


def test_figures_are_written_and_drawn(tmp_path: Path) -> None:
    own, gates = result("megadpo", [1.0, 2.0]), [Gate("x", 1.0, 2.0)]
    tables.write_json(tmp_path / "all.json", {"torch": "2"}, {"rivals": [own]}, gates)
    written = json.loads((tmp_path / "all.json").read_text())
    assert written["sections"]["rivals"][0]["seconds"] == [1.0, 2.0]
    assert written["gates"] == [{"what": "x", "value": 1.0, "bound": 2.0, "at_most": False, "holds": False}]
    tables.draw(tmp_path / "all.png", {"rivals": [own], "layouts": [own]})
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    console = Console(record=True, width=200)
    on_a_card = replace(own, name="card", mfu=0.414)
    for table in (
        tables.loss_table([own]),
        tables.ladder_table("t", [own, own]),
        tables.first_table("t", [own, own]),
        tables.rival_table("t", [own, on_a_card], own),
        tables.gate_table(gates),
    ):
        console.print(table)
    said = console.export_text()
    assert "0.5000000" in said and "fails" in said and "41.4%" in said


# Words of the command line


def test_rivals_are_named_or_none() -> None:
    assert parse(["--pairs", "x"]).rivals == ["naive", "trl"]
    assert parse(["--pairs", "x", "--rivals", "none"]).rivals == []
    with pytest.raises(SystemExit):
        parse(["--pairs", "x", "--rivals", "naive,rl"])


def test_ablations_add_one_part_at_a_time() -> None:
    parts = [[getattr(ablation, field.name) for field in fields(ablation)] for ablation in ABLATIONS.values()]
    assert [sum(row) for row in parts] == [0, 1, 2, 3, 4, 5]
    assert all(a <= b for before, after in pairwise(parts) for a, b in zip(before, after, strict=True))


def test_a_job_survives_the_pipe(workload: Workload, tmp_path: Path) -> None:
    told = job(workload, tmp_path, overrides=("a=1", "b=2"), ablation="padded")
    assert Job.from_json(told.to_json()) == told
