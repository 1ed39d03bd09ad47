"""The training tool against TRL 1.16's DPOTrainer, and TRL's driver against a plain loop: ten steps, two seeds, fp32.

Log-probs are gated beside the loss because many mistakes cancel in it: a mask that lets the prompt in moves the loss by
6e-9 and the log-probs by 94.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.commands import run_tool
from tests.helpers.launch import launch
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import assert_close_weights, exported_weights, training_lines, write_jsonl
from tests.helpers.tiny_models import write_tiny_model
from tests.parity.naive_driver import Settings, read_pairs, response_logp, run_naive

pytest.importorskip("trl")

REPOSITORY = Path(__file__).resolve().parents[2]
SETTINGS = Settings(
    steps=10, batch=2, accum=2, lr=1e-3, beta=0.1, warmup=2, weight_decay=0.01, clip_grad=1.0, max_length=256
)
PAIRS_IN_FILE = 48
PAIRS_SCORED_ALONE = 8


@dataclass(frozen=True)
class Case:
    """One seed's model, reference and data, and what TRL made of them."""

    root: Path
    seed: int

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def reference(self) -> Path:
        return self.root / "reference"

    @property
    def train(self) -> Path:
        return self.root / "train.jsonl"

    @property
    def trl(self) -> Path:
        return self.root / "trl"

    def trl_command(self) -> list[str]:
        """The command that runs TRL on this case."""
        numbers: dict[str, Any] = {
            "seed": self.seed,
            **{name: getattr(SETTINGS, name) for name in ("steps", "batch", "accum", "lr", "beta", "warmup")},
            "weight-decay": SETTINGS.weight_decay,
            "clip-grad": SETTINGS.clip_grad,
            "max-length": SETTINGS.max_length,
        }
        paths = {"model": self.model, "reference": self.reference, "train": self.train, "out": self.trl}
        driver = REPOSITORY / "tests" / "parity" / "trl_driver.py"
        return [sys.executable, str(driver), *(f"--{k}={v}" for k, v in {**paths, **numbers}.items())]

    def trl_lines(self) -> list[dict[str, Any]]:
        """TRL's metrics, its learning rate under this repository's name."""
        lines = [json.loads(line) for line in (self.trl / "metrics.jsonl").read_text().splitlines()]
        return [line | {"lr": line["learning_rate"]} for line in lines]

    def trl_samples(self) -> list[dict[str, float]]:
        """TRL's per-pair log-probs, in order."""
        return [json.loads(line) for line in (self.trl / "samples.jsonl").read_text().splitlines()]


def write_case(root: Path, *, seed: int) -> Case:
    """A tiny model, a reference that differs from it, and pairs: plain text for even seeds, conversations for odd."""
    case = Case(root, seed)
    write_tiny_model(case.model, "llama", seed=seed)
    reference = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32)
    noise = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=noise))
    reference.save_pretrained(case.reference)
    AutoTokenizer.from_pretrained(case.model).save_pretrained(case.reference)
    write_jsonl(case.train, make_pairs(PAIRS_IN_FILE, seed, conversational=seed % 2 == 1))
    return case


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Case]:
    """Both seeds with TRL's results; the two TRL processes run side by side."""
    made = {seed: write_case(tmp_path_factory.mktemp(f"seed{seed}"), seed=seed) for seed in (0, 1)}
    processes = [
        subprocess.Popen(case.trl_command(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for case in made.values()
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    return made


def train(case: Case, name: str, layout: tuple[int, int], *overrides: str) -> Path:
    """Runs tools/train.py on tensor × pipeline ranks; its run directory."""
    tensor, pipeline = layout
    run_dir = case.root / name
    arguments = {
        "+model": "hf",
        "model.hf_path": case.model,
        "reference.hf_path": case.reference,
        "data.train_path": case.train,
        "data.max_length": SETTINGS.max_length,
        "parallel.tensor": tensor,
        "parallel.pipeline": pipeline,
        "precision.dtype": "fp32",
        "device.kind": "cpu",
        "loss.beta": SETTINGS.beta,
        "optimizer.lr": SETTINGS.lr,
        "optimizer.warmup_steps": SETTINGS.warmup,
        "optimizer.weight_decay": SETTINGS.weight_decay,
        "optimizer.clip_grad": SETTINGS.clip_grad,
        "train.shuffle": "false",
        "train.global_batch_size": SETTINGS.pairs_per_step,
        "train.max_steps": SETTINGS.steps,
        "train.run_dir": run_dir,
        "trackers": "[jsonl]",
    } | dict(text.split("=", 1) for text in overrides)
    launch(tensor * pipeline, run_tool, "train", [f"{key}={value}" for key, value in arguments.items()], REPOSITORY)
    return run_dir


def assert_same_lines(expected: list[dict[str, Any]], actual: list[dict[str, Any]]) -> None:
    """Fails unless two runs agree at every step: loss to 1e-5, gradient norm and log-probs to 1e-4 relative, rewards to
    1e-4 absolute and relative, the learning rate to the last bits."""
    assert [line["step"] for line in actual] == [line["step"] for line in expected] == [*range(1, SETTINGS.steps + 1)]
    for want, have in zip(expected, actual, strict=True):
        where = f"step {want['step']}"
        assert have["loss"] == pytest.approx(want["loss"], rel=0, abs=1e-5), where
        for key in ("grad_norm", "logps/chosen", "logps/rejected"):
            assert have[key] == pytest.approx(want[key], rel=1e-4, abs=0), f"{where} {key}"
        for key in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert abs(have[key] - want[key]) <= 1e-4 + 1e-4 * abs(want[key]), f"{where} {key}"
        assert have["rewards/accuracies"] == want["rewards/accuracies"], where
        assert have["lr"] == pytest.approx(want["lr"], rel=1e-12, abs=0), where


def test_cases_show_mistakes(cases: dict[int, Case]) -> None:
    """The inputs can tell right from wrong: cut responses, dropped pairs, a loss far from ln 2, changing gradients."""
    for case in cases.values():
        tokenizer = AutoTokenizer.from_pretrained(case.model)
        pairs = read_pairs(case.train, tokenizer, max_length=SETTINGS.max_length)
        used = pairs[: SETTINGS.steps * SETTINGS.pairs_per_step]
        assert len(used) < len(pairs) < PAIRS_IN_FILE
        lengths = [(len(p.prompt) + len(p.chosen), len(p.prompt) + len(p.rejected)) for p in used]
        assert max(map(max, lengths)) == SETTINGS.max_length
        assert min(map(min, lengths)) < SETTINGS.max_length / 4
        assert any(len(p.chosen) > len(p.rejected) for p in used) and any(len(p.chosen) < len(p.rejected) for p in used)
        assert min(abs(line["loss"] - 0.6931472) for line in case.trl_lines()) > 1e-4


@pytest.mark.parametrize("seed", [0, 1])
def test_trl_is_the_plain_loop(cases: dict[int, Case], seed: int) -> None:
    case = cases[seed]
    naive = run_naive(case.model, case.reference, case.train, SETTINGS)
    assert_same_lines(naive.lines, case.trl_lines())
    for want, have in zip(naive.samples, case.trl_samples(), strict=True):
        for key, value in have.items():
            assert value == pytest.approx(want[key], rel=1e-4, abs=0), f"step {want['step']} {key}"
    assert_close_weights(naive.weights, load_file(case.trl / "final" / "model.safetensors"), largest=SETTINGS.lr / 5)


@pytest.mark.parametrize("layout", [(1, 1), (2, 2)], ids=["tp1", "tp2-pp2"])
@pytest.mark.parametrize("seed", [0, 1])
def test_training_is_trl(cases: dict[int, Case], seed: int, layout: tuple[int, int]) -> None:
    case = cases[seed]
    run_dir = train(case, f"tp{layout[0]}-pp{layout[1]}", layout)
    lines = training_lines(run_dir)
    assert_same_lines(case.trl_lines(), lines)
    for want, have in zip(case.trl_lines(), lines, strict=True):
        assert have["pairs"] == SETTINGS.pairs_per_step
        assert have["epoch"] == pytest.approx(want["epoch"], rel=1e-9)  # the same pairs were dropped
    assert_close_weights(
        load_file(case.trl / "final" / "model.safetensors"), exported_weights(run_dir), largest=SETTINGS.lr / 5
    )


def test_log_probs_of_single_pairs(cases: dict[int, Case]) -> None:
    """Steps of one pair, at a learning rate that moves no weight, show each pair's log-probs under both models."""
    case = cases[1]
    still = ("train.global_batch_size=1", f"train.max_steps={PAIRS_SCORED_ALONE}", "optimizer.schedule=constant")
    lines = training_lines(train(case, "pair-by-pair", (2, 1), *still, "optimizer.lr=1e-12"))
    pairs = read_pairs(case.train, AutoTokenizer.from_pretrained(case.model), max_length=SETTINGS.max_length)
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32).eval() for d in (case.model, case.reference)
    )
    for line, pair in zip(lines, pairs[:PAIRS_SCORED_ALONE], strict=True):
        for kind, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            with torch.no_grad():
                own, ref = (response_logp(model, pair.prompt, response).item() for model in (policy, reference))
            assert line[f"logps/{kind}"] == pytest.approx(own, rel=1e-4, abs=0), f"pair {line['step']} {kind}"
            reward = SETTINGS.beta * (own - ref)
            assert abs(line[f"rewards/{kind}"] - reward) <= 1e-4 + 1e-4 * abs(reward), f"pair {line['step']} {kind}"
