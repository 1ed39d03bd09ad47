"""Tiny random Hugging Face models with a tokenizer, made to show conversion and parallelism mistakes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
FAMILIES = tuple(_CLASSES)


def write_tiny_model(
    directory: Path | str,
    family: str,
    *,
    seed: int = 0,
    vocab_size: int = 401,
    num_layers: int = 4,
    tied: bool | None = None,
    heads: int = 4,
    kv_heads: int = 2,
    hidden: int = 64,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    rope: dict[str, Any] | None = None,
    max_shard_size: str = "5GB",
    initializer_range: float = 0.08,
) -> Path:
    """Writes a random model of the family and its tokenizer; returns the directory. A function of its arguments alone.

    Norm weights lie around 1 and biases around 0, none exactly there, and the vocabulary is odd: a swapped norm, a lost
    bias or an unmasked padding row changes the numbers. `tied` defaults to False, to True for qwen2. `rope` is
    transformers' `rope_parameters`.
    """
    config_class, model_class = _CLASSES[family]
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=1024,
        initializer_range=initializer_range,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=(family == "qwen2") if tied is None else tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        # The class's default is a window.
        **({"sliding_window": None} if family == "mistral" else {}),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.normal_(mean=1.0, std=0.1)
                elif name.endswith("bias"):
                    parameter.normal_(std=0.08)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    write_tiny_tokenizer(directory, vocab_size=vocab_size)
    return Path(directory)


def write_tiny_tokenizer(directory: Path | str, *, vocab_size: int) -> None:
    """Saves a byte-level BPE of exactly `vocab_size` tokens with a chat template.

    Token 0 is pad, 1 bos, 2 eos. Plain text gets a bos in front; the template writes its own, and eos after each turn.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(lines=20 + vocab_size // 4), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} is out of reach: the tokenizer has {tokenizer.get_vocab_size()} tokens"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=1024
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)


def _corpus(*, lines: int) -> list[str]:
    """Lines of pronounceable words, the same on every call."""
    rng = random.Random(20)
    syllables = [c + v for c in "b d f g k l m n p r s t v z".split() for v in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(8 * lines)]
    return [" ".join(rng.choices(words, k=12)) + rng.choice(".!?") for _ in range(lines)]
