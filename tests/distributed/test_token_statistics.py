"""Entropy and token accuracy in the metrics: TRL's definitions, in every layout, in training and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.jobs.training import train
from tests.helpers.launch import launch
from tests.helpers.naive import load_hf
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import exported_weights, metrics, write_jsonl
from tests.helpers.tiny_models import write_tiny_model
from tests.helpers.tokenized import tokenized_pairs

NAMES = ("entropy", "mean_token_accuracy")
LAYOUTS = {
    "tp2": ["parallel.tensor=2"],
    "pp2_vpp2": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "dp2": [],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A directory for runs, a model, one step's pairs; half the responses repeat a token, which the model guesses.

    Its embeddings are tied and its layers add little, so that it echoes what it reads.
    """
    root = tmp_path_factory.mktemp("statistics")
    model = write_tiny_model(root / "model", "qwen2", tied=True)
    weak = load_hf(model)
    with torch.no_grad():
        for name, parameter in weak.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(0.1)
    weak.save_pretrained(model)
    pairs = make_pairs(6, seed=3)
    for pair, key in zip(pairs, ("chosen", "rejected") * 3, strict=True):
        pair[key] = " 0000000000"
    return root, model, write_jsonl(root / "pairs.jsonl", pairs)


def run(files: tuple[Path, Path, Path], name: str, *words: str, ranks: int = 1) -> Path:
    root, model, data = files
    common = [
        "+model=hf",
        f"model.hf_path={model}",
        f"data.train_path={data}",
        f"data.validation_path={data}",
        "data.tokens_per_microbatch=400",
        "precision.dtype=fp32",
        "device.kind=cpu",
        "trackers=[jsonl]",
        "train.global_batch_size=6",
        "train.max_steps=2",
        "optimizer.lr=1e-3",
    ]
    launch(ranks, train, [*common, f"train.run_dir={root / name}", *words])
    return root / name


@pytest.fixture(scope="module")
def one_rank(files: tuple[Path, Path, Path]) -> Path:
    return run(files, "one", "train.log_token_statistics=true")


def by_transformers(model: Path, data: Path) -> dict[str, float]:
    """Mean entropy over all response tokens, share of the chosen ones that are the model's argmax."""
    hf = load_hf(model)
    entropies, is_top1 = [], []
    for pair in tokenized_pairs(data, model):
        for response, hits in ((pair.chosen, is_top1), (pair.rejected, [])):
            ids = torch.tensor([*pair.prompt.tolist(), *response.tolist()])
            with torch.no_grad():
                logits_TV = hf(input_ids=ids[None]).logits[0, len(pair.prompt) - 1 : -1].double()
            log_p_TV = logits_TV.log_softmax(-1)
            entropies.append(-(log_p_TV.exp() * log_p_TV).sum(-1))
            hits.append(logits_TV.argmax(-1) == ids[len(pair.prompt) :])
    return {
        "entropy": float(torch.cat(entropies).mean()),
        "mean_token_accuracy": float(torch.cat(is_top1).double().mean()),
    }


def told(line: dict[str, Any], prefix: str = "") -> dict[str, float]:
    return {name: line[f"{prefix}{name}"] for name in NAMES}


def test_they_are_what_transformers_gives(files: tuple[Path, Path, Path], one_rank: Path) -> None:
    evaluated, first, *_ = metrics(one_rank)
    expected = by_transformers(*files[1:])
    assert 0 < expected["mean_token_accuracy"] < 1
    assert told(evaluated, "eval/") == pytest.approx(expected, rel=1e-5)
    assert told(first) == pytest.approx(expected, rel=1e-5)


def test_they_change_no_other_number(files: tuple[Path, Path, Path], one_rank: Path) -> None:
    plain = run(files, "plain")
    for with_them, without in zip(metrics(one_rank), metrics(plain), strict=True):
        added = {key for key in with_them if key.rpartition("/")[2] in NAMES}
        assert len(added) == 2 and with_them.keys() - added == without.keys()
        for key in without:
            if not key.startswith(("time/", "throughput/", "memory/")) and key != "eval/time_s":
                assert with_them[key] == without[key], key
    a, b = exported_weights(one_rank), exported_weights(plain)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", LAYOUTS)
def test_they_are_the_same_in_every_layout(name: str, files: tuple[Path, Path, Path], one_rank: Path) -> None:
    other = run(files, name, "train.log_token_statistics=true", *LAYOUTS[name], ranks=2)
    for a, b in zip(metrics(one_rank), metrics(other), strict=True):
        prefix = "eval/" if "eval/loss" in a else ""
        assert told(b, prefix) == pytest.approx(told(a, prefix), rel=1e-4)
