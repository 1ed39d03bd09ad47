"""Variable-length attention means what the plan means under each version of torch's call, or says why it can't serve.

Legend: T rows, A query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

import inspect
import logging
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn.attention import varlen as torch_varlen

import megadpo.setup.models
from megadpo.config.choices import AttentionKernel, Dtype
from megadpo.config.schema import Config, DataConfig, DeviceConfig, ModelConfig, PrecisionConfig
from megadpo.errors import ConfigError
from megadpo.models.builder import load_model
from megadpo.models.hf_config import read_architecture
from megadpo.models.kernels import choose_attention
from megadpo.models.segments import Segments
from megadpo.models.varlen import varlen_attend, why_not_varlen
from megadpo.runtime.device import Device
from megadpo.runtime.parallel_state import ParallelState
from megadpo.setup.model_source import model_source
from megadpo.setup.models import load_starting_model
from megadpo.setup.options import log_attention
from megadpo.setup.session import Session
from tests.helpers.jobs.attention import outputs_of_kernels
from tests.helpers.launch import launch
from tests.helpers.plans import PLANS, assert_dense_under_plan, dense_under_plan, random_streams
from tests.helpers.stand_ins.varlen_kernels import KERNELS
from tests.helpers.tiny_models import write_tiny_model

CPU, D = torch.device("cpu"), 16
CUDA = Device("cuda", torch.device("cuda", 0))


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_varlen, "varlen_attn", KERNELS[request.param])


@pytest.fixture
def newest_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_varlen, "varlen_attn", KERNELS["2.12"])


def random_qkv(num_tokens: int, heads: int, kv_heads: int) -> list[torch.Tensor]:
    return random_streams(num_tokens, heads, kv_heads, D)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)])
@pytest.mark.parametrize("name", PLANS)
def test_equals_a_dense_masked_softmax(name: str, heads: int, kv_heads: int) -> None:
    """The stand-in leaves NaN in rows that no sequence covers, so that equality also shows that all are covered."""
    attend = varlen_attend(PLANS[name][0], CPU)
    assert_dense_under_plan(name, attend, random_qkv(PLANS[name][0].num_tokens, heads, kv_heads))


@pytest.mark.usefixtures("kernel")
def test_the_softmax_scale_is_used() -> None:
    plan, _ = PLANS["shared prompt"]
    qkv = random_qkv(plan.num_tokens, 4, 2)
    output = varlen_attend(plan, CPU)(*qkv, 0.9)
    torch.testing.assert_close(output, dense_under_plan("shared prompt", qkv, scale=0.9), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("newest_kernel")
def test_plain_packing_copies_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: object, **options: object) -> None:
        seen.extend([key, value])

    monkeypatch.setattr(torch_varlen, "varlen_attn", kernel)
    query, key, value = random_qkv(PLANS["packed"][0].num_tokens, 4, 2)
    varlen_attend(PLANS["packed"][0], CPU)(query, key, value, None)
    assert seen == [key, value]
    assert seen[0] is key


@pytest.mark.parametrize("name", ["shared prompt", "split response", "pairs and a padding tail"])
def test_gradients_of_copied_keys_add_up_in_one_order(name: str) -> None:
    """To the last bit, row by row: what its own segment says, then the later ones in turn."""
    plan = PLANS[name][0]
    states_TD = torch.randn(plan.num_tokens, D, generator=torch.Generator().manual_seed(7)).requires_grad_()
    keys_KD = Segments.of(plan).gathered_keys(states_TD)
    gradient_KD = torch.randn(keys_KD.shape, generator=torch.Generator().manual_seed(8))
    keys_KD.backward(gradient_KD)
    rows = [row for s in plan.segments for start, stop in s.key_ranges for row in range(start, stop)]
    for row in range(plan.num_tokens):
        assert torch.equal(states_TD.grad[row], sum(gradient_KD[torch.tensor(rows) == row]))


@pytest.mark.parametrize("name", ["packed", "shared prompt"])
def test_the_installed_kernel_takes_the_call(name: str) -> None:
    """On tensors without data: torch's own checks of the call, its autograd formula and its shapes."""
    plan, meta = PLANS[name][0], torch.device("meta")
    qkv = [t.detach().to(meta, torch.bfloat16).requires_grad_() for t in random_qkv(plan.num_tokens, 8, 2)]
    output = varlen_attend(plan, meta)(*qkv, None)
    assert output.shape == qkv[0].shape
    assert output.dtype is torch.bfloat16
    output.backward(torch.empty_like(output))
    assert [t.grad.shape for t in qkv] == [t.shape for t in qkv]


def test_stand_ins_differ_as_the_versions_do() -> None:
    takes = {version: set(inspect.signature(kernel).parameters) for version, kernel in KERNELS.items()}
    asked = {"is_causal", "window_size", "enable_gqa"}
    assert [takes[version] & asked for version in ("2.10", "2.11", "2.12")] == [
        {"is_causal"},
        {"window_size"},
        {"window_size", "enable_gqa"},
    ]


# Which kernel serves


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA build with flash attention on a card of compute capability 9.0, as far as is asked here."""
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("head_dim", [8, 64, 128, 200, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_varlen_serves(dtype: torch.dtype, head_dim: int) -> None:
    assert why_not_varlen(CUDA, dtype, head_dim) is None
    for wanted in ("auto", "varlen"):
        assert choose_attention(wanted, device=CUDA, dtype=dtype, head_dim=head_dim) == "varlen"
    assert choose_attention("sdpa", device=CUDA, dtype=dtype, head_dim=head_dim) == "sdpa"


FLASH, CAPABILITY = "torch.backends.cuda.is_flash_attention_available", "torch.cuda.get_device_capability"
REASONS = [
    ({"device": Device("cpu", CPU)}, {}, r"needs a CUDA device"),
    ({}, {"megadpo.models.varlen.find_spec": None}, r"needs torch 2\.10 or newer, this is 2\..*"),
    ({}, {FLASH: False}, r"needs a build of torch for CUDA with flash attention, 2\..* is another"),
    ({"dtype": torch.float32}, {}, r"needs bf16 or fp16, the model is in float32"),
    ({"head_dim": 264}, {}, r"needs a head dimension that is a multiple of 8 up to 256, the model's is 264"),
    ({"head_dim": 100}, {}, r"needs a head dimension that is a multiple of 8 up to 256, the model's is 100"),
    ({}, {CAPABILITY: (7, 5)}, r"needs compute capability 8\.0 or newer, the device has 7\.5"),
    ({"head_dim": 200}, {CAPABILITY: (8, 6)}, r"has no backward for head dimension 200 on compute capability 8\.6"),
    ({"head_dim": 224}, {CAPABILITY: (12, 0)}, r"has no backward for head dimension 224 on compute capability 12\.0"),
]


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("model", "answers", "reason"), REASONS, ids=[reason for _, _, reason in REASONS])
def test_says_why_varlen_cannot_serve(
    model: dict[str, Any], answers: dict[str, object], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, answer in answers.items():
        monkeypatch.setattr(name, lambda *_, answer=answer: answer)
    model = {"device": CUDA, "dtype": torch.bfloat16, "head_dim": 128, **model}
    assert choose_attention("auto", **model) == "sdpa"
    with pytest.raises(ConfigError, match=rf"device\.attention=varlen: {reason}: use device\.attention=auto or sdpa"):
        choose_attention("varlen", **model)


# In a model, and in a run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("varlen") / "model", "qwen3", num_layers=2)


@pytest.mark.parametrize("share_prompt", [True, False])
def test_a_model_computes_the_same_with_either_kernel(share_prompt: bool, model: Path) -> None:
    ((results, calls),) = launch(1, partial(outputs_of_kernels, share_prompt=share_prompt), str(model))
    assert calls == 2  # one a layer
    assert len(results["varlen"]) > 20
    for name, expected in results["sdpa"].items():
        assert np.abs(expected).max() > 0, name
        np.testing.assert_allclose(results["varlen"][name], expected, rtol=2e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("attention", "device", "dtype", "kernel", "line"),
    [
        ("auto", CUDA, "bf16", "varlen", "attention: varlen"),
        ("varlen", CUDA, "bf16", "varlen", "attention: varlen"),
        ("sdpa", CUDA, "bf16", "sdpa", "attention: sdpa"),
        ("auto", CUDA, "fp32", "sdpa", "attention: sdpa (varlen: needs bf16 or fp16, the model is in float32)"),
        ("auto", Device("cpu", CPU), "bf16", "sdpa", "attention: sdpa (varlen: needs a CUDA device)"),
    ],
)
def test_a_run_builds_its_models_with_the_kernel_it_logs(
    attention: str,
    device: Device,
    dtype: str,
    kernel: str,
    line: str,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = Config(
        model=ModelConfig(name="test", hf_path=str(model)),
        data=DataConfig(train_path=[]),
        device=DeviceConfig(attention=AttentionKernel(attention)),
        precision=PrecisionConfig(dtype=Dtype(dtype)),
    )
    arch, source = read_architecture(model), model_source(config.model)
    session = Session(config, mock.create_autospec(ParallelState), device, source, arch, source, arch)
    monkeypatch.setattr(megadpo.setup.models, "load_model", mock.create_autospec(load_model))
    load_starting_model(session)
    options = megadpo.setup.models.load_model.call_args.args[-1]
    assert options.attention == kernel
    with caplog.at_level(logging.INFO):
        log_attention(session)
    assert [record.getMessage() for record in caplog.records] == [line]
