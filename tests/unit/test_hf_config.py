"""The architecture that is read from a Hugging Face configuration, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megadpo.errors import ConversionError
from megadpo.models import hf_config
from megadpo.models.conversion.mapping import hf_shapes
from megadpo.models.hf_config import Architecture, parse_architecture, read_architecture
from tests.helpers.tiny_models import FAMILIES, write_tiny_model

LLAMA_3_70B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 8192,
    "initializer_range": 0.02,
    "intermediate_size": 28672,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN_2_5_HALF_B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN_3_0_6B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 5.0,
        "original_max_position_embeddings": 4096,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
}


def parse(fields: dict[str, Any], **changes: Any) -> Architecture:
    return parse_architecture({**fields, **changes}, source="config.json")


def test_published_shapes() -> None:
    big, qwen2, qwen3 = parse(LLAMA_3_70B), parse(QWEN_2_5_HALF_B), parse(QWEN_3_0_6B)
    assert big.num_parameters == 70_553_706_496
    assert qwen2.num_parameters == 494_032_768
    assert qwen3.num_parameters == 596_049_920
    assert (big.family, big.num_query_groups, big.head_dim, big.norm_epsilon) == ("llama", 8, 128, 1e-5)
    assert (qwen2.qkv_bias, qwen2.qk_norm, qwen2.tied_embeddings, qwen2.head_dim) == (True, False, True, 64)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.tied_embeddings, qwen3.head_dim) == (False, True, True, 128)


@pytest.mark.parametrize("fields", [LLAMA_3_70B, QWEN_2_5_HALF_B, QWEN_3_0_6B], ids=["llama", "qwen2", "qwen3"])
def test_parameters_are_those_of_the_transformers_model(fields: dict[str, Any]) -> None:
    config = AutoConfig.for_model(**{**fields, "num_hidden_layers": 2})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    arch = parse(fields, num_hidden_layers=2)
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert hf_shapes(arch) == theirs
    assert arch.num_parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_directory_saved_by_this_transformers(tmp_path: Path, family: str) -> None:
    write_tiny_model(tmp_path, family, num_layers=2, head_dim=24, rope=ROPES["yarn"] | {"rope_theta": 1e5})
    arch = read_architecture(tmp_path)
    assert (arch.family, arch.vocab_size, arch.num_layers, arch.head_dim) == (family, 401, 2, 24)
    assert len(arch.inv_freq) == 12 and arch.rope_attention_scaling > 1


@pytest.mark.parametrize("name", ROPES)
def test_scaled_rope_is_that_of_transformers(name: str) -> None:
    fields = {**LLAMA_3_70B, "rope_scaling": ROPES[name]}
    theirs = LlamaRotaryEmbedding(AutoConfig.for_model(**json.loads(json.dumps(fields))))
    arch = parse(fields)
    assert torch.equal(torch.tensor(arch.inv_freq), theirs.inv_freq)
    assert arch.rope_attention_scaling == theirs.attention_scaling
    assert arch.inv_freq != parse(LLAMA_3_70B).inv_freq
    assert (arch.rope_attention_scaling != 1) == (name == "yarn")
    # The spelling of transformers 5 means the same.
    modern = {key: value for key, value in fields.items() if key not in ("rope_scaling", "rope_theta")}
    assert parse(modern, rope_parameters={**ROPES[name], "rope_theta": 500000.0}) == arch


def test_default_rope_follows_its_formula() -> None:
    arch = parse(QWEN_3_0_6B)
    exponents = torch.arange(0, 128, 2, dtype=torch.float64) / 128
    torch.testing.assert_close(torch.tensor(arch.inv_freq, dtype=torch.float64), 1e6**-exponents, rtol=1e-6, atol=0)
    assert arch.rope_attention_scaling == 1.0


@pytest.mark.parametrize(
    ("fields", "changes", "named"),
    [
        (LLAMA_3_70B, {"attention_bias": True}, ["attention_bias = true"]),
        (QWEN_3_0_6B, {"attention_bias": True}, ["attention_bias = true"]),
        (LLAMA_3_70B, {"mlp_bias": True, "hidden_act": "gelu"}, ["mlp_bias = true", 'hidden_act = "gelu"']),
        (LLAMA_3_70B, {"attention_dropout": 0.1}, ["attention_dropout = 0.1"]),
        (QWEN_2_5_HALF_B, {"use_sliding_window": True, "max_window_layers": 1}, ["layer_types", "use_sliding_window"]),
        (QWEN_2_5_HALF_B, {"use_mrope": True}, ["use_mrope = true"]),
        (LLAMA_3_70B, {"sliding_window": 4096}, ["sliding_window = 4096 is not understood"]),
        (LLAMA_3_70B, {"quantization_config": {"quant_method": "fp8"}}, ["quantization_config", "fp8", "dequantize"]),
        (LLAMA_3_70B, {"partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5"]),
        (LLAMA_3_70B, {"logit_scale": 2.0, "residual_scale": 3}, ["logit_scale = 2.0", "residual_scale = 3"]),
        (LLAMA_3_70B, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ['rope type "dynamic"', "llama3"]),
        (
            LLAMA_3_70B,
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}},
            ['rope type "longrope"'],
        ),
        (LLAMA_3_70B, {"rope_scaling": {**ROPES["linear"], "beta_fast": 3}}, ["beta_fast = 3"]),
        (LLAMA_3_70B, {"num_key_value_heads": 7}, ["num_key_value_heads = 7"]),
        (LLAMA_3_70B, {"hidden_size": "8192"}, ["hidden_size"]),
        (LLAMA_3_70B, {"architectures": ["MistralForCausalLM"]}, ["MistralForCausalLM", "LlamaForCausalLM"]),
        (LLAMA_3_70B, {"model_type": "qwen2"}, ["model_type", "llama"]),
    ],
)
def test_refused_fields_are_all_named(fields: dict[str, Any], changes: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ConversionError) as caught:
        parse(fields, **changes)
    assert "config.json" in str(caught.value)
    for text in named:
        assert text in str(caught.value)


def test_unknown_field_passes_with_its_class_default_only(monkeypatch: pytest.MonkeyPatch) -> None:
    # As if `initializer_range` were a field that a new transformers writes and no table lists.
    monkeypatch.delitem(hf_config._IRRELEVANT, "initializer_range")
    parse(LLAMA_3_70B, initializer_range=0.02)
    with pytest.raises(ConversionError, match=r"initializer_range = 0\.03 is not understood"):
        parse(LLAMA_3_70B, initializer_range=0.03)


@pytest.mark.parametrize(("text", "named"), [(None, "does not exist"), ('{"a": 1,\n', ":2: not JSON"), ("[]", "list")])
def test_unreadable_config(tmp_path: Path, text: str | None, named: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConversionError, match=named):
        read_architecture(tmp_path)


def test_padded_vocabulary_does_not_depend_on_usual_layouts() -> None:
    arch = dataclasses.replace(parse(QWEN_2_5_HALF_B), vocab_size=401)
    assert {arch.padded_vocab_size(tp) for tp in (1, 2, 4, 8, 64)} == {512}
    assert arch.padded_vocab_size(3) == 768
    assert dataclasses.replace(arch, vocab_size=512).padded_vocab_size(4) == 512
