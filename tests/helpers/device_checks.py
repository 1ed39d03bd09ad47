"""What must hold on any device, each check as one function of the device: tests/gpu runs them on CUDA.

Every check makes small models and pairs of its own under `root` and starts its ranks itself.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.helpers.jobs.training import score_and_export, train
from tests.helpers.launch import launch
from tests.helpers.naive import pair_logps
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import exported_weights, training_lines, write_jsonl
from tests.helpers.tiny_models import write_tiny_model
from tests.helpers.tokenized import tokenized_pairs

TRAIN = Path(__file__).resolve().parents[2] / "tools" / "train.py"
# Sizes that FP8's products take: features are multiples of 128.
SIZES = {"hidden": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "num_layers": 2}


def run_words(root: Path, name: str, *more: str) -> list[str]:
    """Words of a 6-step run in `root / name`; the model and the pairs are made when they are not there."""
    model, data = root / "model", root / "pairs.jsonl"
    if not model.exists():
        write_tiny_model(model, "qwen3", **SIZES)
        write_jsonl(data, make_pairs(18, seed=5))
    return [
        "+model=hf",
        f"model.hf_path={model}",
        f"data.train_path={data}",
        f"train.run_dir={root / name}",
        "data.tokens_per_microbatch=640",  # of which every FP8 recipe's multiple is a part
        "trackers=[jsonl]",
        "train.max_steps=6",
        "train.save_every=3",
        "train.global_batch_size=6",
        "optimizer.lr=1e-4",
        "optimizer.schedule=constant",
        *more,
    ]


def fp8_words(recipe: str) -> list[str]:
    """Words of a run in FP8 by Transformer Engine, with the margin monitor."""
    return [
        "precision.dtype=bf16",
        "precision.backend=transformer_engine",
        f"precision.fp8={recipe}",
        "precision.fp8_check_every=3",
    ]


def check_scores(root: Path, device: str, dtype: torch.dtype, kernels: Mapping[str, str]) -> None:
    """Log-probs of every pair are transformers' in fp32, to 1e-4 or to bf16's rounding; the export is bit-equal."""
    model = write_tiny_model(root / "scored", "qwen3", **SIZES, dtype=dtype)
    data = write_jsonl(root / "scored.jsonl", make_pairs(12, seed=3))
    job = partial(score_and_export, dtype=dtype, device_kind=device, kernels=kernels)
    ((scores,),) = (launch(1, job, [str(model)], str(data), {"tensor": 1}),)
    expected = pair_logps(model, tokenized_pairs(data, model, max_length=512))
    assert scores[str(model)].keys() == expected.keys()
    for index, logps in expected.items():
        assert scores[str(model)][index] == pytest.approx(logps, rel=1e-4 if dtype is torch.float32 else 1e-2)
    exported = Path(f"{model}-export-tensor1") / "model.safetensors"
    assert exported.read_bytes()[-1024:] == (model / "model.safetensors").read_bytes()[-1024:]


def check_training(root: Path, device: str, words: list[str], *, loss: float, norm: float, world: int = 1) -> None:
    """A run follows the one-rank CPU run of the same precision, to `loss` and, relatively, `norm` of the gradient.

    Its first loss is ln 2 to 1e-6, as policy and reference are the same to the last bit.
    """
    dtype = next(word for word in words if word.startswith("precision.dtype="))
    launch(1, train, run_words(root, "on_cpu", "device.kind=cpu", dtype, "train.resume=auto"))
    launch(world, train, run_words(root, "on_device", f"device.kind={device}", *words))
    lines = list(zip(training_lines(root / "on_cpu"), training_lines(root / "on_device"), strict=True))
    assert len(lines) == 6
    assert lines[0][1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for expected, actual in lines:
        assert actual["loss"] == pytest.approx(expected["loss"], abs=loss), f"step {actual['step']}"
        assert actual["grad_norm"] == pytest.approx(expected["grad_norm"], rel=norm), f"step {actual['step']}"
        assert actual["tokens"] == expected["tokens"]
    assert lines[-1][1]["loss"] < lines[0][1]["loss"]


def check_resuming(root: Path, device: str, words: list[str], *, tolerance: float) -> None:
    """Interrupted after three of six steps and resumed, a run ends with the weights of an uninterrupted one."""
    words = [f"device.kind={device}", "train.resume=auto", *words]
    launch(1, train, run_words(root, "whole", *words))
    shutil.copytree(root / "whole", root / "resumed")
    shutil.rmtree(root / "resumed" / "hf")
    shutil.rmtree(root / "resumed" / "checkpoints" / "step_00000006")
    launch(1, train, run_words(root, "resumed", *words))
    whole, resumed = exported_weights(root / "whole"), exported_weights(root / "resumed")
    assert whole.keys() == resumed.keys()
    apart = max(float((whole[name].float() - resumed[name].float()).abs().max()) for name in whole)
    assert apart <= tolerance


def check_command(root: Path, device: str) -> None:
    """tools/train.py under torchrun trains with the default settings of precision and kernels and exports a model."""
    words = run_words(root, "command", f"device.kind={device}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RANK", None)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    result = subprocess.run(
        [sys.executable, *launcher, str(TRAIN), *words],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert training_lines(root / "command")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (root / "command" / "hf" / "model.safetensors").is_file()
