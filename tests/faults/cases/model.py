"""Bad models, tokenizers, references and checkpoints, refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from tests.faults.cases.case import (
    CHAT_PAIR,
    INDEX_FILE,
    SINGLE_FILE,
    Case,
    Change,
    config,
    edit_json,
    model_case,
    remove,
    rename,
    row,
    tokenizer_config,
    weights,
    write,
)

_QUERY, _DOWN = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
_CONFIG = r"HERE/model/config\.json: \d not supported:\n"
_FILE = r"HERE/model/model\.safetensors cannot be read: "
_INDEX = r"HERE/model/model\.safetensors\.index\.json"
_MISFIT = r"HERE/model: \d weights don't fit its config\.json; download the model again, or bring the config.*:\n  "
_NO_TOKENIZER = r"HERE/model holds no tokenizer that can be loaded \(tokenizer\.json and .* needed; copy the model's th"
_CHAT = json.dumps(CHAT_PAIR) + "\n"


# ------------------------------------------------------------------------------------------------------------- changes
def _remove_a_shard(directory: Path) -> None:
    (directory / "model-00001-of-00004.safetensors").unlink()


def _cut_off(directory: Path) -> None:
    write(SINGLE_FILE, (directory / SINGLE_FILE).read_bytes()[:-1000])(directory)


def _place_norm(file: str) -> Change:
    """Says of the last norm, which lies in another file, that it lies in `file`."""
    return edit_json(
        INDEX_FILE, lambda index: {**index, "weight_map": {**index["weight_map"], "model.norm.weight": file}}
    )


def _spoil(value: float) -> Change:
    """Puts `value` where only the last of two ranks looks: of tensor-parallel ones its columns, of stages its layer."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[_DOWN][0, -1] = value

    return weights(edit)


def _add_token(content: dict[str, Any]) -> dict[str, Any]:
    token = {"id": 401, "content": "<new>", "single_word": False, "lstrip": False, "rstrip": False}
    return {**content, "added_tokens": [*content["added_tokens"], {**token, "normalized": False, "special": True}]}


# --------------------------------------------------------------------------------------------------------------- cases
_CONFIGURATION = [
    Case("no model", ("model.hf_path=HERE/none",), r"model\.hf_path=HERE/none: must be a Hugging Face directory with "),
    model_case(
        "no config.json", remove("config.json"), r"model\.hf_path=HERE/model: must be a Hugging Face directory "
    ),
    model_case(
        "config.json that is no JSON",
        write("config.json", '{\n"architectures": [\n'),
        r"HERE/model/config\.json:3: not JSON \(Expecting value\); download it again",
    ),
    model_case(
        "config.json nested too deeply",
        write("config.json", "[" * 100_000),
        r"HERE/model/config\.json cannot be read \(.*recursion.*\); download it again",
    ),
    model_case(
        "config.json that is a list",
        write("config.json", "[]"),
        r"HERE/model/config\.json holds a list, it must hold an object: download it again",
    ),
    model_case("size that is no number", config(hidden_size="many"), _CONFIG + ".*'hidden_size' expected int, got str"),
    model_case(
        "architecture",
        config(architectures=[["GPT2LMHeadModel"]]),
        r'HERE/model/config\.json: architectures = \[\["GPT2LMHeadModel"\]\] is not supported; it must name one of',
    ),
    model_case(
        "sliding window",
        config(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=16),
        _CONFIG + '.*sliding_window = 16 must be null, or at least .*write "sliding_window": null into the file',
    ),
    model_case(
        "fields that are not mapped",
        config(hidden_act="gelu", attention_bias=True, mlp_bias=True, novel_trick=3),
        _CONFIG + "  novel_trick = 3 is not understood; remove the field if .*hidden_act = .gelu. must be silu.*"
        "attention_bias = true must be false.*mlp_bias = true must be false",
    ),
    model_case(
        "rope type",
        config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        _CONFIG + '  rope type "dynamic" is not supported; it must be one of default, linear, llama3, yarn',
    ),
    model_case(
        "rope without a base",
        config(rope_parameters={"rope_type": "default", "rope_theta": 0}),
        _CONFIG + r"  rope_parameters = \{.*\} must give finite rotary frequencies above 0",
    ),
    model_case(
        "rope base that is no number",
        config(rope_parameters={"rope_type": "default", "rope_theta": "big"}),
        _CONFIG + r"  rope_parameters = \{.*\} must give finite rotary frequencies above 0",
    ),
    model_case("epsilon", config(rms_norm_eps=-1.0), _CONFIG + r"  rms_norm_eps = -1\.0 must be a finite number > 0"),
    model_case(
        "quantized model",
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        _CONFIG + "  quantization_config = .* must be absent: load the model, dequantize it and save it in bf16 first",
    ),
    model_case(
        "groups of heads",
        config(num_attention_heads=4, num_key_value_heads=3),
        _CONFIG + "  num_attention_heads = 4 must be a multiple of num_key_value_heads = 3",
    ),
    Case(
        "another model than the named one",
        ("+model=llama3_8b", "model.hf_path=MODEL"),
        r"model\.hf_path=MODEL: must be a llama3_8b \(model\.shape\), it differs: num_layers is 2 instead of 32; .*: "
        r"use \+model=hf model\.hf_path=MODEL, which takes any",
    ),
]

_LAYOUT = [
    model_case(
        "heads over tensor ranks",
        config(hidden_size=48, num_attention_heads=3, num_key_value_heads=1),
        r"parallel\.tensor=2: must divide the model's 3 attention heads: use parallel\.tensor=1 or another divisor",
        "parallel.tensor=2",
    ),
    model_case(
        "key-value heads over tensor ranks",
        config(hidden_size=48, num_attention_heads=6, num_key_value_heads=3),
        r"parallel\.tensor=2: must divide the model's 3 key-value heads or be a multiple of them: use parallel",
        "parallel.tensor=2",
    ),
    model_case(
        "MLP channels over tensor ranks",
        config(intermediate_size=127),
        r"parallel\.tensor=2: must divide the model's 127 MLP channels: use parallel\.tensor=1 or another divisor",
        "parallel.tensor=2",
    ),
    model_case(
        "layers over stages",
        config(num_hidden_layers=3),
        r"parallel\.pipeline=2: 2 equal parts cannot be cut from the model's 3 layers: use a number that divides 3",
        "parallel.pipeline=2",
    ),
    Case(
        "layers over model chunks",
        ("parallel.pipeline=2", "parallel.virtual_pipeline=2"),
        r"parallel\.pipeline=2, parallel\.virtual_pipeline=2: 4 equal parts cannot be cut from the model's 2 layers: ",
    ),
    Case(
        "world size",
        ("parallel.tensor=4",),
        r"parallel\.tensor=4, parallel\.pipeline=1: .*4 must divide the world size 2: start torchrun with a multiple",
    ),
]

_WEIGHTS = [
    model_case(
        "no weights", remove(SINGLE_FILE), r"HERE/model holds neither model\.safetensors nor .*; name a directory"
    ),
    model_case(
        ".bin weights",
        rename(SINGLE_FILE, "pytorch_model.bin"),
        r"HERE/model holds \.bin weights only; convert them with\n  python -c .*from_pretrained\('HERE/model'",
    ),
    model_case(
        "missing shard",
        _remove_a_shard,
        r"HERE/model/model-00001-of-00004\.safetensors does not exist, but .* names it; complete the download",
        sharded=True,
    ),
    model_case(
        "file and index",
        write(INDEX_FILE, "{}"),
        r"HERE/model holds both model\.safetensors and model\.safetensors\.index\.json; remove the one that is stale",
    ),
    model_case(
        "index that is no JSON", write(INDEX_FILE, "{"), _INDEX + r":1: not JSON .*; download it again", sharded=True
    ),
    model_case(
        "index nested too deeply",
        write(INDEX_FILE, "[" * 100_000),
        _INDEX + r" cannot be read \(.*recursion.*\); download it again",
        sharded=True,
    ),
    model_case(
        "lying index",
        _place_norm("model-00001-of-00004.safetensors"),
        _INDEX + r" contradicts the files beside it; download both again:\n  model\.norm\.weight is in model-.*, the i",
        sharded=True,
    ),
    model_case(
        "path traversal in the index",
        _place_norm("../../secret.safetensors"),
        _INDEX
        + r" names files that don't lie beside it; .*Don't trust this download:\n  model\.norm\.weight: '\.\./\.",
        sharded=True,
    ),
    model_case("corrupt header", write(SINGLE_FILE, b"\xff" * 64), _FILE + "none of its 64 bytes make .*; download or"),
    model_case(
        "header nested too deeply",
        write(SINGLE_FILE, (100_000).to_bytes(8, "little") + b"[" * 100_000),
        _FILE + "none of its 100008 bytes make a safetensors header; download or export it again",
    ),
    model_case(
        "pointer of Git LFS",
        write(SINGLE_FILE, "version https://git-lfs.github.com/spec/v1\n"),
        _FILE + "it is the pointer of Git LFS, not the weights; fetch them with git lfs pull",
    ),
    model_case(
        "cut-off file", _cut_off, _FILE + r"it has \d+ bytes and its header describes \d+, so the download was c"
    ),
    model_case("missing weight", weights(lambda t: t.pop(_QUERY)), _MISFIT + r".*q_proj\.weight is missing"),
    model_case(
        "extra weight",
        weights(lambda t: t.update(surplus=torch.zeros(2))),
        _MISFIT + r"surplus \[2\] has no place in a llama model",
    ),
    model_case(
        "wrong shape",
        weights(lambda t: t.update({_QUERY: t[_QUERY][1:].clone()})),
        _MISFIT + r".*q_proj\.weight has shape \[63, 64\], the configuration asks for \[64, 64\]",
    ),
    model_case(
        "quantized weight",
        weights(lambda t: t.update({_QUERY: t[_QUERY].to(torch.int8)})),
        _MISFIT + r".*q_proj\.weight has dtype I8; quantized weights are not supported, dequantize them first",
    ),
    model_case(
        "NaN weight",
        _spoil(math.nan),
        r"HERE/model: these weights cannot be trained; give other ones:\n  .*down_proj\.weight holds NaN or infinite v",
        "parallel.tensor=2",
        reads_weights=True,
    ),
    model_case(
        "infinite weight",
        _spoil(math.inf),
        r"HERE/model: these weights cannot be trained; give other ones:\n  .*down_proj\.weight holds NaN or infinite v",
        "parallel.pipeline=2",
        reads_weights=True,
    ),
    model_case(
        "head that is tied, and differs",
        config(tie_word_embeddings=True),
        r"HERE/model: these .*\n  lm_head\.weight differs from .*; set tie_word_embeddings to false, or remove the",
        reads_weights=True,
    ),
]

_TOKENIZER = [
    model_case("no tokenizer", remove("tokenizer.json", "tokenizer_config.json"), _NO_TOKENIZER),
    model_case("no tokenizer.json", remove("tokenizer.json"), _NO_TOKENIZER),
    model_case("cut-off tokenizer.json", write("tokenizer.json", '{"version": "1.0", "model": {'), _NO_TOKENIZER),
    model_case("empty tokenizer.json", write("tokenizer.json", "{}"), _NO_TOKENIZER),
    model_case(
        "unknown kind of tokenizer",
        edit_json("tokenizer.json", lambda content: {**content, "model": {"type": "Novel"}}),
        _NO_TOKENIZER,
    ),
    model_case("corrupt tokenizer_config.json", write("tokenizer_config.json", "["), _NO_TOKENIZER),
    model_case(
        "no end token",
        tokenizer_config(eos_token=None),
        r"the tokenizer in HERE/model has no end token; set eos_token in its tokenizer_config\.json",
    ),
    model_case(
        "no chat template",
        remove("chat_template.jinja"),
        r"HERE/pairs\.jsonl:1: conversational data, but the tokenizer has no chat template; add chat_template\.jinja",
        pairs=_CHAT,
    ),
    model_case(
        "template that refuses a system role",
        write("chat_template.jinja", "{{ raise_exception('System role not supported') }}"),
        r"HERE/pairs\.jsonl:1: the chat template refuses the conversation: System role not supported; data\.on_error=",
        pairs=_CHAT,
    ),
    model_case(
        "template that fails",
        write("chat_template.jinja", "{{ 1 // 0 }}"),
        r"HERE/pairs\.jsonl:1: the chat template refuses the conversation: .*by zero",
        pairs=_CHAT,
    ),
    model_case(
        "template that leaves responses out",
        write("chat_template.jinja", "{{ messages[0]['content'] }}"),
        r"none of the 1 training pairs is left .*nothing of a response .*\): look at the data and the chat template",
        pairs=_CHAT,
    ),
    model_case(
        "added tokens beyond the embedding",
        edit_json("tokenizer.json", _add_token),
        r"HERE/pairs\.jsonl:1: pair 0 has token id 401, the model's vocabulary has 401 entries: .*without resizing the",
        pairs=row(chosen=" <new>"),
    ),
]

_REFERENCE_AND_CHECKPOINT = [
    Case(
        "no reference", ("reference.hf_path=HERE/none",), r"reference\.hf_path=HERE/none: must be a Hugging Face dire"
    ),
    model_case(
        "reference with another vocabulary",
        config(vocab_size=500),
        r"reference\.hf_path=HERE/model: its vocabulary has 500 entries, the policy's 401: .*: give one that does",
        *("model.hf_path=MODEL", "reference.hf_path=HERE/model"),
    ),
    model_case(
        "reference without a weight",
        weights(lambda t: t.pop(_QUERY)),
        _MISFIT + r".*q_proj\.weight is missing",
        *("model.hf_path=MODEL", "reference.hf_path=HERE/model"),
    ),
    Case(
        "two sources of weights",
        ("model.checkpoint=HERE",),
        r".*2\. model\.checkpoint=HERE: must be the only source of weights, model\.hf_path=MODEL is another: drop one",
    ),
    Case(
        "no checkpoint",
        ("model.hf_path=null", "model.checkpoint=HERE/none"),
        r"model\.checkpoint=HERE/none: must be the directory of a checkpoint or a run: check the path, or make one",
    ),
    Case(
        "checkpoint that is none",
        ("model.hf_path=null", "model.checkpoint=HERE"),
        r"model\.checkpoint=HERE: HERE holds no complete checkpoint .*: give the directory of a run",
    ),
]

CASES = [*_CONFIGURATION, *_LAYOUT, *_WEIGHTS, *_TOKENIZER, *_REFERENCE_AND_CHECKPOINT]
