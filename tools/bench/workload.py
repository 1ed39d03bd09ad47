"""The workload: a random Llama with a tokenizer trained on the data, and the pairs that all contenders keep.

The pairs are written once, in a form that all contenders read, and cut to whole steps: no contender drops any, all cut
the same responses, and see the same pairs in the same step.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from megadpo.data.dataset import RawPair, iter_rows, parse_row
from megadpo.data.layouts import Keys
from megadpo.data.tokenization import TokenizedPair, load_tokenizer, tokenize_pair
from megadpo.data.truncation import Outcome, cut_to_length
from megadpo.errors import DataError
from megadpo.metrics.flops import FlopRates, pair_flops, step_flops

_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a Llama; the defaults are the small model of docs/performance.md."""

    hidden: int = 256
    intermediate: int = 688
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    vocab: int = 8192


def write_model(directory: Path, shape: Shape, texts: Iterator[str]) -> None:
    """Writes a Llama with random weights (seed 0) and a ChatML tokenizer whose byte-level BPE is trained on `texts`.

    The model's vocabulary may be larger than the tokenizer's.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocab, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|im_end|>")
    fast.chat_template = _CHATML
    fast.save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    disable_progress_bar()
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)


@dataclass(frozen=True, slots=True)
class Workload:
    """Files that the contenders read, and the lengths of the pairs in them."""

    model: Path
    pairs: Path
    tokens: Path
    lengths: tuple[tuple[int, int, int], ...]
    """tokens of (prompt, chosen, rejected) after truncation, in order"""
    read: int
    kept: int
    """of those read, before they are cut to whole steps"""
    truncated: int
    """pairs that lose response tokens"""
    pairs_per_step: int

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps until the pairs repeat."""
        return len(self.lengths) // self.pairs_per_step

    def lengths_of(self, step: int) -> Sequence[tuple[int, int, int]]:
        """Lengths of the pairs of step 0, 1, …"""
        start = step % self.steps_per_epoch * self.pairs_per_step
        return self.lengths[start : start + self.pairs_per_step]

    def step_tokens(self, step: int) -> int:
        """Number of tokens of a step's sequences, with prompts counted twice."""
        return sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in self.lengths_of(step))

    def step_flops(self, rates: FlopRates, step: int, *, share_prompt: bool) -> int:
        """FLOPs that a step with a live reference needs, by true lengths."""
        forward = sum(pair_flops(rates, *lengths, share_prompt=share_prompt) for lengths in self.lengths_of(step))
        return step_flops(forward, forward)


def read_pairs(path: Path) -> list[RawPair]:
    """Reads the pairs of a file in any layout that megadpo supports."""
    keys = Keys()
    return [parse_row(row, keys) for row in iter_rows([str(path)], keys)]


def prompt_heavy_pairs(like: Sequence[RawPair], number: int, *, words: int) -> list[RawPair]:
    """Makes pairs of random words of other pairs, with responses of about `words` and prompts four times as long."""
    rng = random.Random(0)
    known = [word for text in texts_of(like) for word in text.split()]

    def said(role: str, count: int) -> list[dict[str, Any]]:
        return [{"role": role, "content": " ".join(rng.choices(known, k=count))}]

    def pair(index: int) -> RawPair:
        count = round(words * rng.uniform(0.6, 1.4))
        prompt, chosen, rejected = (said(r, k * count) for r, k in (("user", 4), ("assistant", 1), ("assistant", 1)))
        return RawPair(index, "", prompt, chosen, rejected)

    return [pair(index) for index in range(number)]


def texts_of(pairs: Sequence[RawPair]) -> Iterator[str]:
    """All texts of the pairs."""
    for pair in pairs:
        for side in (pair.prompt, pair.chosen, pair.rejected):
            yield from [side] if isinstance(side, str) else (str(message["content"]) for message in side)


def write_workload(
    directory: Path, model: Path, pairs: Sequence[RawPair], *, pairs_per_step: int, max_length: int
) -> Workload:
    """Writes the pairs that are kept at `max_length`, cut to whole steps; DataError if none is left."""
    tokenizer = load_tokenizer(model)
    tokenized = [tokenize_pair(pair, tokenizer).pair for pair in pairs]
    lengths = np.array([_lengths(pair) for pair in tokenized], np.int32).reshape(-1, 3)
    cut = cut_to_length(*lengths.T, max_length=max_length, mode="keep_start")
    kept = np.flatnonzero(cut.outcome_n == Outcome.KEPT)
    used = kept[: len(kept) // pairs_per_step * pairs_per_step]
    if not len(used):
        raise DataError(
            f"{len(kept)} of {len(pairs)} pairs are kept at max_length {max_length}, a step takes {pairs_per_step}: "
            "give more pairs, or let a step take fewer"
        )
    directory.mkdir(parents=True)
    rows, ids = [], []
    for i in used:
        raw, pair = pairs[i], tokenized[i]
        rows.append({"prompt": raw.prompt, "chosen": raw.chosen, "rejected": raw.rejected})
        chosen, rejected = pair.chosen[: cut.chosen_n[i]], pair.rejected[: cut.rejected_n[i]]
        ids.append([part.tolist() for part in (pair.prompt, chosen, rejected)])
    (directory / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (directory / "tokens.json").write_text(json.dumps(ids), encoding="utf-8")
    return Workload(
        model=model,
        pairs=directory / "pairs.jsonl",
        tokens=directory / "tokens.json",
        lengths=tuple((len(prompt), len(chosen), len(rejected)) for prompt, chosen, rejected in ids),
        read=len(pairs),
        kept=len(kept),
        truncated=int(((cut.chosen_n < lengths[:, 1]) | (cut.rejected_n < lengths[:, 2]))[used].sum()),
        pairs_per_step=pairs_per_step,
    )


def _lengths(pair: TokenizedPair) -> tuple[int, int, int]:
    return len(pair.prompt), len(pair.chosen), len(pair.rejected)
