"""A model's architecture, read from a Hugging Face `config.json`; unknown or unsupported fields are refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from megadpo.errors import ConversionError
from megadpo.metrics.flops import FlopRates, flop_rates


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """All properties of a model, besides its weights, that its outputs depend on.

    `inv_freq` holds head_dim/2 rotary frequencies (fp32 values) with any static scaling already applied, and
    `rope_attention_scaling` multiplies the rotary cosines and sines.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    norm_epsilon: float
    qkv_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    inv_freq: tuple[float, ...]
    rope_attention_scaling: float
    max_position_embeddings: int

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """Vocabulary rounded up to a multiple of lcm(128, tensor_parallel).

        It is the same for every tensor-parallel size that divides 128, so that checkpoints move between them.
        """
        multiple = math.lcm(128, tensor_parallel)
        return -(-self.vocab_size // multiple) * multiple

    @property
    def flop_rates(self) -> FlopRates:
        """FLOPs of a forward pass."""
        return flop_rates(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
        )

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the Hugging Face model: without padding, tied embeddings counted once."""
        query, key_value = self.num_attention_heads * self.head_dim, self.num_query_groups * self.head_dim
        attention = 2 * self.hidden_size * (query + key_value)
        attention += (query + 2 * key_value) * self.qkv_bias + 2 * self.head_dim * self.qk_norm
        layer = attention + 3 * self.hidden_size * self.ffn_hidden_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return embeddings + self.num_layers * layer + self.hidden_size


_RotaryClass = type[LlamaRotaryEmbedding | MistralRotaryEmbedding | Qwen2RotaryEmbedding | Qwen3RotaryEmbedding]


@dataclass(frozen=True, kw_only=True)
class _Family:
    """A supported model class of transformers, and the weights that it has besides the common ones.

    `window_everywhere`: if `sliding_window` is a number, every layer attends through a sliding window.
    """

    name: str
    config_class: type[PreTrainedConfig]
    rotary_class: _RotaryClass
    qkv_bias: bool = False
    qk_norm: bool = False
    window_everywhere: bool = False
    own_fields: frozenset[str] = frozenset()


# Fields from which transformers derives the sliding-window layers of a Qwen; it resolves them to `layer_types`.
_QWEN_WINDOW = frozenset({"use_sliding_window", "sliding_window", "max_window_layers"})

_FAMILIES = {
    "LlamaForCausalLM": _Family(name="llama", config_class=LlamaConfig, rotary_class=LlamaRotaryEmbedding),
    "MistralForCausalLM": _Family(
        name="mistral",
        config_class=MistralConfig,
        rotary_class=MistralRotaryEmbedding,
        window_everywhere=True,
        own_fields=frozenset({"sliding_window"}),
    ),
    "Qwen2ForCausalLM": _Family(
        name="qwen2",
        config_class=Qwen2Config,
        rotary_class=Qwen2RotaryEmbedding,
        qkv_bias=True,
        own_fields=_QWEN_WINDOW,
    ),
    "Qwen3ForCausalLM": _Family(
        name="qwen3", config_class=Qwen3Config, rotary_class=Qwen3RotaryEmbedding, qk_norm=True, own_fields=_QWEN_WINDOW
    ),
}

# Fields that go into Architecture; these are sizes.
_SIZES = frozenset(
    {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
    | {"num_key_value_heads", "head_dim", "max_position_embeddings"}
)
# Upper limits, far above all models: transformers allocates lists of layers and labels, and a tensor of a head's size.
_MAX = {"num_hidden_layers": 10_000, "head_dim": 2**16, "num_labels": 100_000}
_MAX_ANY = 2**28
_MAPPED = _SIZES | {"architectures", "model_type", "rms_norm_eps", "tie_word_embeddings"}
_MAPPED |= {"rope_theta", "rope_scaling", "rope_parameters"}

# Fields that do not change the forward pass of a training, and why.
_IRRELEVANT: dict[str, str] = {
    **dict.fromkeys(GenerationConfig().to_dict(), "steers generation only"),
    "prefix": "steers generation only",
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"), "the tokenizer decides"),
    "tokenizer_class": "the tokenizer decides",
    **dict.fromkeys(("torch_dtype", "dtype"), "each tensor's own dtype and precision.dtype decide"),
    "initializer_range": "weights are loaded, never drawn",
    "pretraining_tp": "a blocked evaluation of the same products, which transformers has dropped",
    **dict.fromkeys(("transformers_version", "_name_or_path"), "a record of how the file was made"),
    **dict.fromkeys(("unsloth_version", "unsloth_fixed"), "a record of how the file was made"),
    **dict.fromkeys(("output_attentions", "output_hidden_states"), "selects what transformers' own forward returns"),
    **dict.fromkeys(("return_dict", "torchscript"), "selects what transformers' own forward returns"),
    **dict.fromkeys(("attn_implementation", "_attn_implementation"), "transformers' choice of kernel"),
    "_attn_implementation_autoset": "transformers' choice of kernel",
    **dict.fromkeys(("id2label", "label2id", "num_labels", "problem_type"), "for classifiers"),
    "task_specific_params": "for pipelines",
}


def _one_of(*values: object) -> Callable[[object], bool]:
    return lambda value: value in values


# Fields of which only one meaning is supported: test of the value, and the requirement for the message.
_FIXED: dict[str, tuple[Callable[[object], bool], str]] = {
    "hidden_act": (_one_of("silu"), "must be silu: the gated feed-forward is SwiGLU"),
    "attention_bias": (_one_of(False, None), "must be false: it would add a bias to the attention's output projection"),
    "mlp_bias": (_one_of(False, None), "must be false: feed-forward biases are not supported"),
    "attention_dropout": (_one_of(0, None), "must be 0: dropout is not supported"),
    "partial_rotary_factor": (_one_of(1, None), "must be 1: rotary embeddings over a part of a head are not supported"),
    "use_mrope": (_one_of(False, None), "must be false: multimodal rotary embeddings are not supported"),
    "layer_types": (
        lambda value: value is None or (isinstance(value, list) and set(value) <= {"full_attention"}),
        "must be all full_attention: sliding windows are not supported (see use_sliding_window)",
    ),
    "quantization_config": (_one_of(None), "must be absent: load the model, dequantize it and save it in bf16 first"),
    "is_encoder_decoder": (_one_of(False, None), "must be false: only decoders are supported"),
    "add_cross_attention": (_one_of(False, None), "must be false: only decoders are supported"),
    "chunk_size_feed_forward": (_one_of(0, None), "must be 0"),
}

# Rope types whose frequencies don't depend on the sequence's length, and the keys that each may have.
_ROPE_COMMON = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_ROPE_KEYS = {
    "default": _ROPE_COMMON,
    "linear": _ROPE_COMMON | {"factor"},
    "llama3": _ROPE_COMMON | {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": _ROPE_COMMON
    | {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"}
    | {"mscale", "mscale_all_dim", "truncate"},
}


def read_architecture(hf_dir: Path | str) -> Architecture:
    """Reads the architecture of the Hugging Face model in `hf_dir`; ConversionError names all unsupported fields."""
    path = Path(hf_dir) / "config.json"
    if path.exists() and not path.is_file():  # reading a pipe would wait forever
        raise ConversionError(f"{path} is not a file; download it again")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{path} does not exist; name a directory saved by save_pretrained") from None
    except json.JSONDecodeError as error:
        raise ConversionError(f"{path}:{error.lineno}: not JSON ({error.msg}); download it again") from None
    except (ValueError, RecursionError, OSError) as error:
        raise ConversionError(f"{path} cannot be read ({error}); download it again") from None
    if not isinstance(fields, dict):
        raise ConversionError(f"{path} holds a {type(fields).__name__}, it must hold an object: download it again")
    try:
        return parse_architecture(fields, source=str(path))
    except RecursionError:  # from copying or printing deeply nested values that the decoder has accepted
        raise ConversionError(f"{path} is nested too deeply; download it again") from None


def parse_architecture(fields: Mapping[str, Any], *, source: str) -> Architecture:
    """Parses the fields of a Hugging Face configuration; error messages begin with `source`.

    Every field must be used, known not to matter, or equal to the only supported value. A field that is unknown here
    passes if the installed transformers knows it and it has the class's default, with which the conversion was tested.
    """
    family = _family(fields, source)
    problems = _unknown_fields(fields, family)
    problems += [
        f"{name} = {value} must be at least 1"
        for name, value in fields.items()
        if name in _SIZES and type(value) is int and value < 1
    ]
    too_large = _too_large(fields)
    if too_large:
        raise _refusal(source, [*problems, *too_large])
    try:
        config = family.config_class.from_dict(copy.deepcopy(dict(fields)))
    except (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        problems.append(f"transformers refuses it: {error}")
        raise _refusal(source, problems) from error
    resolved = config.to_dict()
    problems += [
        f"{name} = {_short(value)} {requirement}"
        for name, (accepts, requirement) in _FIXED.items()
        if not accepts(value := resolved.get(name, fields.get(name)))
    ]
    problems += _window_problems(resolved) if family.window_everywhere else []
    problems += _rope_problems(resolved["rope_parameters"])
    heads, groups = resolved["num_attention_heads"], resolved["num_key_value_heads"]
    if groups >= 1 and heads % groups:
        problems.append(f"num_attention_heads = {heads} must be a multiple of num_key_value_heads = {groups}")
    if not 0 < (epsilon := resolved["rms_norm_eps"]) < math.inf:
        problems.append(f"rms_norm_eps = {epsilon} must be a finite number > 0")
    if problems:
        raise _refusal(source, problems)
    head_dim = resolved.get("head_dim") or resolved["hidden_size"] // heads
    if head_dim > _MAX["head_dim"]:
        derived = f"hidden_size / num_attention_heads = {head_dim} must be at most {_MAX['head_dim']}"
        raise _refusal(source, [derived])
    inv_freq, attention_scaling = _rope(family, config, source)
    return Architecture(
        family=family.name,
        num_layers=resolved["num_hidden_layers"],
        hidden_size=resolved["hidden_size"],
        ffn_hidden_size=resolved["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        vocab_size=resolved["vocab_size"],
        norm_epsilon=epsilon,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        tied_embeddings=resolved["tie_word_embeddings"],
        inv_freq=inv_freq,
        rope_attention_scaling=attention_scaling,
        max_position_embeddings=resolved["max_position_embeddings"],
    )


def differences(found: Architecture, expected: Architecture) -> list[str]:
    """Lines with both values of each property that two architectures differ in; [] if their weights can be exchanged.

    The maximum number of positions is left out: base models and their chat versions differ in it, and no output depends
    on it.
    """
    lines = [
        f"{field.name} is {_short(getattr(found, field.name))} instead of {_short(getattr(expected, field.name))}"
        for field in dataclasses.fields(Architecture)
        if field.name not in ("inv_freq", "max_position_embeddings")
        and getattr(found, field.name) != getattr(expected, field.name)
    ]
    # A different head_dim is reported above, and implies a different number of frequencies.
    if found.head_dim == expected.head_dim:
        apart = [pair for pair in zip(found.inv_freq, expected.inv_freq, strict=True) if pair[0] != pair[1]]
        if apart:
            lines.append(
                f"inv_freq (rope_theta and rope_scaling) differs in {len(apart)} of {len(found.inv_freq)} rotary "
                f"frequencies, the first is {apart[0][0]:.6g} instead of {apart[0][1]:.6g}"
            )
    return lines


def _family(fields: Mapping[str, Any], source: str) -> _Family:
    architectures = fields.get("architectures")
    if architectures not in [[name] for name in _FAMILIES]:
        raise ConversionError(
            f"{source}: architectures = {_short(architectures)} is not supported; it must name one of "
            + ", ".join(_FAMILIES)
        )
    family = _FAMILIES[architectures[0]]
    if fields.get("model_type", family.name) != family.name:
        raise ConversionError(
            f"{source}: model_type = {_short(fields['model_type'])} contradicts architectures = "
            f"{_short(architectures)}; it must be {family.name}"
        )
    return family


def _too_large(fields: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} = {_short(value)} must be at most {_MAX.get(name, _MAX_ANY)}"
        for name, value in fields.items()
        if name in _SIZES | _MAX.keys() and isinstance(value, (int, float)) and value > _MAX.get(name, _MAX_ANY)
    ]


def _unknown_fields(fields: Mapping[str, Any], family: _Family) -> list[str]:
    known = _MAPPED | family.own_fields | _IRRELEVANT.keys() | _FIXED.keys()
    defaults = family.config_class().to_dict()
    return [
        f"{name} = {_short(value)} is not understood; remove the field if the model computes the same without it"
        for name, value in fields.items()
        if name not in known and not (name in defaults and value == defaults[name])
    ]


def _window_problems(resolved: Mapping[str, Any]) -> list[str]:
    window, positions = resolved["sliding_window"], resolved["max_position_embeddings"]
    if window is None or window >= positions:
        return []
    return [
        f"sliding_window = {window} must be null, or at least max_position_embeddings = {positions}: sliding windows "
        "are not supported. If no sequence is longer than the window (data.max_length), the model computes the same "
        f'without it: write "sliding_window": null into the file and keep data.max_length <= {window}'
    ]


def _rope_problems(rope: Mapping[str, Any]) -> list[str]:
    rope_type = rope["rope_type"]
    if rope_type not in list(_ROPE_KEYS):
        return [f"rope type {_short(rope_type)} is not supported; it must be one of {', '.join(_ROPE_KEYS)}"]
    problems = [
        f"rope {name} = {_short(value)} has no meaning for rope type {rope_type}"
        for name, value in rope.items()
        if name not in _ROPE_KEYS[rope_type]
    ]
    factor = rope.get("partial_rotary_factor")
    if factor not in (None, 1):
        problems.append(f"rope partial_rotary_factor = {factor} {_FIXED['partial_rotary_factor'][1]}")
    return problems


def _rope(family: _Family, config: PreTrainedConfig, source: str) -> tuple[tuple[float, ...], float]:
    try:
        # transformers' own module, so that the frequencies of every static rope type are equal to the last bit.
        with torch.device("cpu"):
            rotary = family.rotary_class(config)
        frequencies, scaling = rotary.get_buffer("inv_freq").tolist(), float(rotary.attention_scaling)
        if all(0 < number < math.inf for number in (*frequencies, scaling)):
            return tuple(frequencies), scaling
        reason = "with these they are not"
    except (TypeError, ValueError, ArithmeticError) as error:
        reason = str(error)
    rope = _short(config.to_dict()["rope_parameters"])
    raise _refusal(source, [f"rope_parameters = {rope} must give finite rotary frequencies above 0: {reason}"])


def _refusal(source: str, problems: list[str]) -> ConversionError:
    return ConversionError(f"{source}: {len(problems)} not supported:\n" + "\n".join(f"  {text}" for text in problems))


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 120 else text[:117] + "..."
