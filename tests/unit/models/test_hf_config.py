"""The architecture that is read from a Hugging Face configuration, and what is refused."""

from __future__ import annotations

import copy
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
from megadpo.models.hf_config import Architecture, differences, parse_architecture, read_architecture
from tests.helpers.published import (
    LLAMA_2_7B,
    LLAMA_3_1_8B,
    LLAMA_3_8B,
    LLAMA_3_70B,
    MISTRAL_7B_V01,
    MISTRAL_7B_V03,
    PUBLISHED,
    QWEN_2_5_7B,
    QWEN_2_5_7B_INSTRUCT,
    QWEN_2_5_HALF_B,
    QWEN_3_0_6B,
)
from tests.helpers.tiny_models import FAMILIES, write_tiny_model

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


def without(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != name}


def parse(fields: dict[str, Any], **changes: Any) -> Architecture:
    return parse_architecture({**fields, **changes}, source="config.json")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_parameters_that_transformers_counts(name: str) -> None:
    fields, parameters = PUBLISHED[name]
    arch = parse(fields)
    assert arch.num_parameters == parameters
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**copy.deepcopy(fields)))
    theirs = {parameter: tuple(value.shape) for parameter, value in model.named_parameters()}
    assert hf_shapes(arch) == theirs
    assert sum(value.numel() for value in model.parameters()) == parameters


def test_published_properties() -> None:
    llama2, llama3, mistral = parse(LLAMA_2_7B), parse(LLAMA_3_70B), parse(MISTRAL_7B_V03)
    qwen2, qwen3 = parse(QWEN_2_5_HALF_B), parse(QWEN_3_0_6B)
    assert (llama2.num_query_groups, llama2.tied_embeddings, llama2.vocab_size) == (32, False, 32000)
    assert llama2.inv_freq[-1] == pytest.approx(10000 ** (-126 / 128))
    assert (llama3.family, llama3.num_query_groups, llama3.head_dim, llama3.norm_epsilon) == ("llama", 8, 128, 1e-5)
    assert (mistral.family, mistral.num_query_groups, mistral.qkv_bias, mistral.qk_norm) == ("mistral", 8, False, False)
    assert (qwen2.qkv_bias, qwen2.qk_norm, qwen2.tied_embeddings, qwen2.head_dim) == (True, False, True, 64)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.tied_embeddings, qwen3.head_dim) == (False, True, True, 128)


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
        (LLAMA_3_70B, {"num_key_value_heads": 0}, ["num_key_value_heads = 0 must be at least 1"]),
        (LLAMA_3_70B, {"num_attention_heads": 0}, ["num_attention_heads = 0 must be at least 1"]),
        (
            LLAMA_3_70B,
            {"num_hidden_layers": 10**30},
            ["num_hidden_layers = 1000000000000000000000000000000 must be at most"],
        ),
        (MISTRAL_7B_V01, {}, ["sliding_window = 4096 must be null", "32768", "data.max_length <= 4096"]),
        (without(MISTRAL_7B_V01, "sliding_window"), {}, ["sliding_window = 4096 must be null"]),
        (MISTRAL_7B_V03, {"attention_bias": True}, ["attention_bias = true"]),
        (LLAMA_3_70B, {"hidden_size": "8192"}, ["hidden_size"]),
        (LLAMA_3_70B, {"architectures": ["MixtralForCausalLM"]}, ["MixtralForCausalLM", "LlamaForCausalLM"]),
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


@pytest.mark.parametrize("window", [None, 32768, 65536])
def test_a_window_as_wide_as_the_positions_has_no_effect(window: int | None) -> None:
    assert parse(MISTRAL_7B_V03, sliding_window=window) == parse(MISTRAL_7B_V03)


def test_differences_name_every_property_with_both_values() -> None:
    llama3, small = parse(LLAMA_3_8B), parse(LLAMA_3_8B, num_hidden_layers=2, vocab_size=128257)
    assert differences(small, llama3) == ["num_layers is 2 instead of 32", "vocab_size is 128257 instead of 128256"]
    assert differences(parse(QWEN_2_5_7B_INSTRUCT), parse(QWEN_2_5_7B)) == []
    (line,) = differences(parse(LLAMA_3_1_8B), llama3)
    assert line.startswith(
        "inv_freq (rope_theta and rope_scaling) differs in 35 of 64 rotary frequencies, the first is "
    )
    wide = differences(parse(LLAMA_3_8B, head_dim=64), llama3)
    assert wide == ["head_dim is 64 instead of 128"]


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
