"""Transformer Engine's attention is called so that it means what the plan means, or says why it can't serve.

The kernel is a stand-in with the real one's signature, which refuses what the real one would do slowly or wrongly.
Legend: T rows, A query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

from megadpo.errors import ConfigError
from megadpo.models.kernels import choose_attention
from megadpo.models.te_attention import dot_product_attention, te_attend
from megadpo.runtime.device import Device
from tests.helpers.plans import PLANS, assert_dense_under_plan, random_streams

CPU, D = torch.device("cpu"), 16
CUDA = Device("cuda", torch.device("cuda", 0))
KERNEL = Path(__file__).parents[2] / "helpers/stand_ins/te/transformer_engine/pytorch/attention.py"


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A transformer_engine.pytorch that holds the attention and cuDNN's version, and the fused kernel alone."""
    spec = spec_from_file_location("te_attention_stand_in", KERNEL)
    attention = module_from_spec(spec)
    spec.loader.exec_module(attention)
    package = ModuleType("transformer_engine.pytorch")
    package.DotProductAttention = attention.DotProductAttention
    package.get_cudnn_version = lambda: (9, 19, 0)
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", package)
    for kernel, enabled in (("FLASH", "0"), ("FUSED", "1"), ("UNFUSED", "0")):
        monkeypatch.setenv(f"NVTE_{kernel}_ATTN", enabled)
    return package


def random_qkv(num_tokens: int, heads: int, kv_heads: int) -> list[torch.Tensor]:
    return random_streams(num_tokens, heads, kv_heads, D)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)])
@pytest.mark.parametrize("name", PLANS)
def test_equals_a_dense_masked_softmax(name: str, heads: int, kv_heads: int) -> None:
    """The stand-in leaves NaN in rows that no sequence covers, so that equality also shows that all are covered."""
    attend = te_attend(PLANS[name][0], CPU, dot_product_attention(heads=heads, kv_heads=kv_heads, head_dim=D))
    assert_dense_under_plan(name, attend, random_qkv(PLANS[name][0].num_tokens, heads, kv_heads))


def test_it_is_given_lengths_that_it_need_not_read_back() -> None:
    """int32 starts on the device, longest lengths as whole numbers that change seldom, nothing padded."""
    core = mock.Mock(side_effect=lambda q, k, v, **_: q.flatten(1))
    plan, _ = PLANS["pairs and a padding tail"]
    te_attend(plan, CPU, core)(*random_qkv(plan.num_tokens, 4, 2), None)
    (query, key, value), options = core.call_args
    assert len(query) == plan.num_tokens
    assert len(key) == len(value) == plan.num_tokens + 4 + 1  # the two prompts that rejected responses see
    starts = {name: options.pop(name) for name in ("cu_seqlens_q", "cu_seqlens_kv")}
    assert [starts["cu_seqlens_q"].tolist(), starts["cu_seqlens_kv"].tolist()] == [
        [0, 7, 12, 19, 21, 24],
        [0, 7, 16, 23, 26, 29],
    ]
    assert {tensor.dtype for tensor in starts.values()} == {torch.int32}
    assert options == {
        "qkv_format": "thd",
        "attn_mask_type": "padding_causal_bottom_right",
        "max_seqlen_q": 64,
        "max_seqlen_kv": 64,
    }
    long, _ = PLANS["one"]
    core.reset_mock()
    te_attend(long, CPU, core)(*random_qkv(long.num_tokens, 4, 2), None)
    assert core.call_args.kwargs["max_seqlen_q"] == 64


def test_another_softmax_scale_is_refused() -> None:
    plan, _ = PLANS["one"]
    with pytest.raises(ValueError, match=r"built with the scale 1/√D, not 0\.9"):
        te_attend(plan, CPU, mock.Mock())(*random_qkv(plan.num_tokens, 4, 2), 0.9)


# Where it serves


@pytest.fixture
def served(package: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`choose_attention` for a bf16 model with heads of 128 on Hopper, where Transformer Engine's layers can serve."""
    monkeypatch.setattr("megadpo.models.te_attention.why_not_transformer_engine", lambda device, dtype: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    return partial(choose_attention, device=CUDA, dtype=torch.bfloat16)


def test_it_is_taken_by_name_only(served: Callable[..., str]) -> None:
    assert served("transformer_engine", head_dim=128) == "transformer_engine"
    assert served("auto", head_dim=128) == "varlen"


@pytest.mark.parametrize(
    ("answers", "head_dim", "reason"),
    [
        ({}, 264, r"needs a head dimension that is a multiple of 8 up to 256, the model's is 264"),
        ({"torch.cuda.get_device_capability": (8, 0)}, 128, r"is known for compute capability 9 and 10, .* has 8\.0"),
        ({"transformer_engine.pytorch.get_cudnn_version": (9, 5, 1)}, 128, r"needs cuDNN 9\.7 .*, this is 9\.5\.1"),
        ({"torch.are_deterministic_algorithms_enabled": True}, 128, r"needs cuDNN 9\.25 .* deterministic on Hopper"),
        (
            {"megadpo.models.te_attention.why_not_transformer_engine": "is not there: install it"},
            128,
            r"is not there: install it",
        ),
    ],
)
def test_says_why_it_cannot_serve(
    answers: dict[str, Any], head_dim: int, reason: str, served: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, answer in answers.items():
        owner, _, attribute = name.rpartition(".")
        target = sys.modules.get(owner)
        if target is None:
            monkeypatch.setattr(name, lambda *_, answer=answer: answer)
        else:
            monkeypatch.setattr(target, attribute, lambda *_, answer=answer: answer)
    with pytest.raises(ConfigError, match=rf"device\.attention=transformer_engine: {reason}"):
        served("transformer_engine", head_dim=head_dim)
