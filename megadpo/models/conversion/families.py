"""Tables of the Hugging Face tensors that make up each Megatron parameter: one per family, used in both directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megadpo.models.hf_config import Architecture


class Axis(Enum):
    """Names of the sizes that axes of Hugging Face tensors have."""

    VOCAB = "vocabulary"
    HIDDEN = "hidden size"
    FFN = "feed-forward size"
    QUERY = "query heads x head size"
    KEY_VALUE = "key-value heads x head size"
    HEAD = "head size"


class Split(Enum):
    """The way in which a Megatron parameter is split over the tensor-parallel ranks."""

    REPLICATED = "every rank holds all of it"
    VOCAB_ROWS = "rows of the padded vocabulary, in order"
    QKV_ROWS = "rows grouped per key-value head: its query heads, its key, its value; a slice of them in order"
    GATE_UP_ROWS = "this rank's rows of the gate, then its rows of the up projection"
    COLUMNS = "columns, in order"


@dataclass(frozen=True)
class HFTensor:
    """One Hugging Face tensor: its name (`{layer}` is the global layer index from 0) and its axes."""

    name: str
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class WeightRow:
    """One Megatron parameter, and the Hugging Face tensors that it is made of.

    `when` returns True for architectures that have it. `copy_of_another` marks a parameter that repeats the tensors of
    another row: it is loaded if it exists, and never exported.
    """

    megatron: str
    split: Split
    hf: tuple[HFTensor, ...]
    when: Callable[[Architecture], bool] = lambda arch: True
    copy_of_another: bool = False


@dataclass(frozen=True)
class Family:
    """The table of one family, and regular expressions of tensors in its checkpoints that are ignored."""

    rows: tuple[WeightRow, ...]
    ignorable: tuple[str, ...]


# Names in a checkpoint of weights that the native layers call otherwise. They are those of Transformer Engine's fused
# layers, so that a checkpoint written with one kind of layers loads into the other.
CHECKPOINT_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}

_HF_LAYER = "model.layers.{layer}."
_MEGATRON_LAYER = "decoder.layers.{layer}."

EMBEDDING = HFTensor("model.embed_tokens.weight", (Axis.VOCAB, Axis.HIDDEN))
LM_HEAD = HFTensor("lm_head.weight", (Axis.VOCAB, Axis.HIDDEN))


def _layer(name: str, *axes: Axis) -> HFTensor:
    return HFTensor(_HF_LAYER + name, axes)


_BEFORE_LAYERS = (WeightRow("embedding.word_embeddings.weight", Split.VOCAB_ROWS, (EMBEDDING,)),)

_INPUT_NORM = WeightRow(
    _MEGATRON_LAYER + "input_layernorm.weight", Split.REPLICATED, (_layer("input_layernorm.weight", Axis.HIDDEN),)
)
_QKV_WEIGHT = WeightRow(
    _MEGATRON_LAYER + "self_attention.linear_qkv.weight",
    Split.QKV_ROWS,
    (
        _layer("self_attn.q_proj.weight", Axis.QUERY, Axis.HIDDEN),
        _layer("self_attn.k_proj.weight", Axis.KEY_VALUE, Axis.HIDDEN),
        _layer("self_attn.v_proj.weight", Axis.KEY_VALUE, Axis.HIDDEN),
    ),
)
_QKV_BIAS = WeightRow(
    _MEGATRON_LAYER + "self_attention.linear_qkv.bias",
    Split.QKV_ROWS,
    (
        _layer("self_attn.q_proj.bias", Axis.QUERY),
        _layer("self_attn.k_proj.bias", Axis.KEY_VALUE),
        _layer("self_attn.v_proj.bias", Axis.KEY_VALUE),
    ),
    when=lambda arch: arch.qkv_bias,
)
_Q_NORM = WeightRow(
    _MEGATRON_LAYER + "self_attention.q_layernorm.weight",
    Split.REPLICATED,
    (_layer("self_attn.q_norm.weight", Axis.HEAD),),
    when=lambda arch: arch.qk_norm,
)
_K_NORM = WeightRow(
    _MEGATRON_LAYER + "self_attention.k_layernorm.weight",
    Split.REPLICATED,
    (_layer("self_attn.k_norm.weight", Axis.HEAD),),
    when=lambda arch: arch.qk_norm,
)
_ATTENTION_OUT = WeightRow(
    _MEGATRON_LAYER + "self_attention.linear_proj.weight",
    Split.COLUMNS,
    (_layer("self_attn.o_proj.weight", Axis.HIDDEN, Axis.QUERY),),
)
_MLP = (
    WeightRow(
        _MEGATRON_LAYER + "pre_mlp_layernorm.weight",
        Split.REPLICATED,
        (_layer("post_attention_layernorm.weight", Axis.HIDDEN),),
    ),
    WeightRow(
        _MEGATRON_LAYER + "mlp.linear_fc1.weight",
        Split.GATE_UP_ROWS,
        (
            _layer("mlp.gate_proj.weight", Axis.FFN, Axis.HIDDEN),
            _layer("mlp.up_proj.weight", Axis.FFN, Axis.HIDDEN),
        ),
    ),
    WeightRow(
        _MEGATRON_LAYER + "mlp.linear_fc2.weight",
        Split.COLUMNS,
        (_layer("mlp.down_proj.weight", Axis.HIDDEN, Axis.FFN),),
    ),
)

_AFTER_LAYERS = (
    WeightRow("decoder.final_layernorm.weight", Split.REPLICATED, (HFTensor("model.norm.weight", (Axis.HIDDEN,)),)),
    WeightRow("output_layer.weight", Split.VOCAB_ROWS, (LM_HEAD,), when=lambda arch: not arch.tied_embeddings),
    # With tied embeddings the last of several pipeline stages keeps its own copy of the embedding as its head.
    WeightRow(
        "output_layer.weight",
        Split.VOCAB_ROWS,
        (EMBEDDING,),
        when=lambda arch: arch.tied_embeddings,
        copy_of_another=True,
    ),
)

# Rotary frequencies that old versions of transformers saved as buffers; they follow from the configuration.
_ROTARY_BUFFERS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq")

_PLAIN = Family((*_BEFORE_LAYERS, _INPUT_NORM, _QKV_WEIGHT, _ATTENTION_OUT, *_MLP, *_AFTER_LAYERS), _ROTARY_BUFFERS)

FAMILIES: dict[str, Family] = {
    "llama": _PLAIN,
    "mistral": _PLAIN,
    "qwen2": Family(
        (*_BEFORE_LAYERS, _INPUT_NORM, _QKV_WEIGHT, _QKV_BIAS, _ATTENTION_OUT, *_MLP, *_AFTER_LAYERS), _ROTARY_BUFFERS
    ),
    "qwen3": Family(
        (*_BEFORE_LAYERS, _INPUT_NORM, _QKV_WEIGHT, _Q_NORM, _K_NORM, _ATTENTION_OUT, *_MLP, *_AFTER_LAYERS),
        _ROTARY_BUFFERS,
    ),
}
