"""Scoring, training, checkpoints, export and the command do on CUDA what they do on a CPU, with every kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megadpo.models.backend import why_not_transformer_engine
from megadpo.models.fp8 import Fp8, why_not_fp8
from megadpo.models.fp8_recipes import default_format
from megadpo.runtime.device import Device
from tests.helpers.device_checks import check_command, check_resuming, check_scores, check_training, fp8_words
from tests.helpers.runs import metrics

NATIVE = ["precision.backend=native"]
BY_TE = ["precision.backend=transformer_engine", "device.attention=transformer_engine"]


def skip_without_transformer_engine() -> None:
    problem = why_not_transformer_engine(Device("cuda", torch.device("cuda", 0)), torch.bfloat16)
    if problem is not None:
        pytest.skip(problem)


@pytest.fixture(params=["native", "transformer_engine"])
def backend(request: pytest.FixtureRequest) -> list[str]:
    """Words that choose layers and, with Transformer Engine's, its attention."""
    if request.param == "native":
        return NATIVE
    skip_without_transformer_engine()
    return BY_TE


@pytest.mark.parametrize(
    ("dtype", "kernels"),
    [
        (torch.float32, {"attention": "sdpa"}),
        (torch.bfloat16, {"attention": "sdpa"}),
        (torch.bfloat16, {"attention": "varlen"}),
        (torch.bfloat16, {"backend": "transformer_engine", "attention": "varlen"}),
        (torch.bfloat16, {"backend": "transformer_engine", "attention": "transformer_engine"}),
    ],
)
def test_scores(dtype: torch.dtype, kernels: dict[str, str], tmp_path: Path) -> None:
    if "backend" in kernels:
        skip_without_transformer_engine()
    check_scores(tmp_path, "cuda", dtype, kernels)


def test_fp32_training(tmp_path: Path) -> None:
    check_training(tmp_path, "cuda", ["precision.dtype=fp32"], loss=1e-4, norm=1e-3)


def test_bf16_training(backend: list[str], tmp_path: Path) -> None:
    check_training(tmp_path, "cuda", ["precision.dtype=bf16", *backend], loss=2.5e-2, norm=5e-2)


@pytest.mark.parametrize("mode", ["offload", "cached"])
def test_references_that_are_not_resident(mode: str, tmp_path: Path) -> None:
    check_training(tmp_path, "cuda", ["precision.dtype=fp32", f"reference.mode={mode}"], loss=1e-4, norm=1e-3)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_fp8_training(recipe: str, tmp_path: Path) -> None:
    """The recipes without a history: policy and reference are quantised alike, so that the first loss is still ln 2."""
    device = Device("cuda", torch.device("cuda", 0))
    fp8 = Fp8(recipe=recipe, format=default_format(recipe), emulated=False)
    problem = why_not_fp8(fp8, device, torch.bfloat16)
    if problem is not None:
        pytest.skip(problem)
    check_training(tmp_path, "cuda", fp8_words(recipe), loss=2.5e-2, norm=0.15)
    checks = [line for line in metrics(tmp_path / "on_device") if "fp8/margin_error" in line]
    assert [line["step"] for line in checks] == [0, 3, 6]
    assert checks[0]["fp8/margin_error"] == 0 < checks[0]["fp8/policy_margin_error"]


def test_resuming_and_export(backend: list[str], tmp_path: Path) -> None:
    check_resuming(tmp_path, "cuda", ["precision.dtype=bf16", *backend], tolerance=2e-3)


def test_the_command(tmp_path: Path) -> None:
    check_command(tmp_path, "cuda")


@pytest.mark.parametrize(
    "layout", [["parallel.tensor=2"], ["parallel.pipeline=2"], []], ids=["tensor2", "pipeline2", "data2"]
)
def test_two_devices(layout: list[str], backend: list[str], tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices: torch sees {torch.cuda.device_count()}")
    words = ["precision.dtype=bf16", *backend, *layout]
    check_training(tmp_path, "cuda", words, loss=2.5e-2, norm=5e-2, world=2)
