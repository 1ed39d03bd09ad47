"""Decodes token ids for display: special tokens are marked, and control characters shown as symbols."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from transformers import PreTrainedTokenizerBase

from megadpo.data.tokenization import TokenizedPair
from megadpo.errors import visible


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of consecutive tokens, all special or none."""

    text: str
    special: bool


@dataclass(frozen=True, slots=True)
class ShownPair:
    """A pair as in training: its context, and the parts that are scored."""

    index: int
    where: str
    prompt: list[Piece]
    chosen: list[Piece]
    rejected: list[Piece]
    tokens: tuple[int, int, int]
    """kept of prompt, chosen and rejected"""
    full_tokens: tuple[int, int, int]
    """the same before truncation"""

    def described_tokens(self) -> tuple[str, str, str]:
        """Numbers of tokens of prompt, chosen and rejected in words."""
        told = [
            f"{kept:,} tokens" if kept == full else f"{kept:,} of {full:,} tokens"
            for kept, full in zip(self.tokens, self.full_tokens, strict=True)
        ]
        return told[0], told[1], told[2]


def show_pair(pair: TokenizedPair, full_tokens: tuple[int, int, int], tokenizer: PreTrainedTokenizerBase) -> ShownPair:
    """Decodes a pair; each response is decoded after its prompt, since some decoders strip a leading space."""
    special = special_ids(tokenizer)
    start = len(pair.prompt)

    def pieces(response: np.ndarray, begin: int) -> list[Piece]:
        return list(decode_pieces([*pair.prompt.tolist(), *response.tolist()], begin, tokenizer, special))

    return ShownPair(
        index=pair.index,
        where=pair.where,
        prompt=pieces(pair.prompt[:0], 0),
        chosen=pieces(pair.chosen, start),
        rejected=pieces(pair.rejected, start),
        tokens=(start, len(pair.chosen), len(pair.rejected)),
        full_tokens=full_tokens,
    )


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of all special tokens, including those without a named role (turn markers)."""
    added = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset({*tokenizer.all_special_ids, *added})


def decode_pieces(
    ids: list[int], begin: int, tokenizer: PreTrainedTokenizerBase, special: frozenset[int]
) -> Iterator[Piece]:
    """Decodes the tokens from `begin` on to pieces; each special token is a piece of its own."""
    position = begin
    for is_special, run in groupby(ids[begin:], key=special.__contains__):
        end = position + len(list(run))
        if is_special:
            yield from (Piece(visible(str(tokenizer.convert_ids_to_tokens(i))), True) for i in ids[position:end])
        else:
            yield Piece(visible(_text_behind(ids[:position], ids[position:end], tokenizer)), False)
        position = end


def _text_behind(before: list[int], ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    head, whole = decode(before), decode(before + ids)
    return whole.removeprefix(head) if whole.startswith(head) else decode(ids)
