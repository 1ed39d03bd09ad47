"""Which layers a run takes, what it says when they can't serve, and what its config.yaml will hold."""

from __future__ import annotations

import logging
from typing import Any
from unittest import mock

import pytest
import torch
from packaging.version import Version

import megadpo.setup.options
from megadpo.config.choices import Backend, Dtype
from megadpo.config.schema import Config, DataConfig, ModelConfig, PrecisionConfig
from megadpo.errors import ConfigError
from megadpo.models import backend
from megadpo.models.backend import choose_backend, transformer_engine_version
from megadpo.runtime.device import Device
from megadpo.setup.backend import settle_backend
from megadpo.setup.options import log_backend

CPU, CUDA = Device("cpu", torch.device("cpu")), Device("cuda", torch.device("cuda", 0))
VERSION, CAPABILITY = "megadpo.models.backend.transformer_engine_version", "torch.cuda.get_device_capability"


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card of compute capability 9.0 with Transformer Engine 2.11 as NVIDIA's images number it."""
    monkeypatch.setattr(VERSION, lambda: Version("2.11.0+c9a8b7"))
    monkeypatch.setattr(CAPABILITY, lambda device: (9, 0))


def configured(wanted: str, dtype: str = "bf16") -> Config:
    return Config(
        model=ModelConfig(name="test"),
        data=DataConfig(train_path=[]),
        precision=PrecisionConfig(dtype=Dtype(dtype), backend=Backend(wanted)),
    )


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("wanted", "device", "dtype", "chosen"),
    [
        ("auto", CUDA, "bf16", "transformer_engine"),
        ("transformer_engine", CUDA, "bf16", "transformer_engine"),
        ("native", CUDA, "bf16", "native"),
        ("auto", CUDA, "fp32", "native"),
        ("auto", CPU, "bf16", "native"),
    ],
)
def test_a_configuration_says_what_was_chosen(wanted: str, device: Device, dtype: str, chosen: str) -> None:
    settled = settle_backend(configured(wanted, dtype), device)
    assert settled.precision.backend == chosen
    assert settle_backend(settled, device) == settled


REASONS = [
    ({"device": CPU}, {}, r"needs a CUDA device: set device\.kind=cuda"),
    ({"dtype": torch.float32}, {}, r"its matrix products round fp32 to TF32, .*: set precision\.dtype=bf16"),
    (
        {},
        {VERSION: None},
        r"is not installed, .*NVIDIA's PyTorch image.* or pip install .*transformer-engine\[pytorch\]",
    ),
    ({}, {VERSION: Version("2.8.1")}, r"Transformer Engine 2\.8\.1 is installed, >=2\.9,<2\.12 is known: use NVIDIA's"),
    ({}, {CAPABILITY: (7, 5)}, r"needs compute capability 8\.0 or newer, the device has 7\.5: take a newer card"),
]


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("model", "answers", "reason"), REASONS, ids=[reason for _, _, reason in REASONS])
def test_says_why_transformer_engine_cannot_serve(
    model: dict[str, Any], answers: dict[str, object], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, answer in answers.items():
        monkeypatch.setattr(name, lambda *_, answer=answer: answer)
    model = {"device": CUDA, "dtype": torch.bfloat16, **model}
    assert choose_backend("auto", **model) == "native"
    with pytest.raises(ConfigError, match=rf"precision\.backend=transformer_engine: .*{reason}"):
        choose_backend("transformer_engine", **model)


def test_its_absence_and_a_broken_one_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    assert transformer_engine_version() is None
    assert caplog.text == ""
    monkeypatch.setattr(backend, "find_spec", lambda name: mock.sentinel.spec)
    monkeypatch.setitem(__import__("sys").modules, "transformer_engine", None)  # which makes the import fail
    assert transformer_engine_version() is None
    assert "transformer_engine is installed and can't be imported: " in caplog.text


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("wanted", "device", "dtype", "line"),
    [
        (
            "transformer_engine",
            CUDA,
            "bf16",
            "layers: transformer_engine 2.11.0+c9a8b7; weight gradients are added up inside the matrix product; ",
        ),
        ("native", CUDA, "bf16", "layers: native; weight gradients are added up after the matrix product; "),
        ("native", CUDA, "fp32", "layers: native (transformer_engine: its matrix products round fp32 to TF32, "),
        ("native", CPU, "bf16", "layers: native; "),
    ],
)
def test_a_run_says_what_its_layers_are(
    wanted: str,
    device: Device,
    dtype: str,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(megadpo.setup.options, "transformer_engine_version", lambda: Version("2.11.0+c9a8b7"))
    with caplog.at_level(logging.INFO):
        log_backend(configured(wanted, dtype), device)
    (record,) = caplog.records
    assert record.getMessage().startswith(line)
    assert record.getMessage().endswith("AdamW is torch's")
