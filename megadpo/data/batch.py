"""A microbatch as the model's input: a packed stream of tokens, and the meaning of its rows.

Legend: T tokens of the stream, N response rows, B pairs, S = 2·B sequences (chosen of pair i is i, rejected is B + i).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from megadpo.data.tokenization import TokenizedPair
from megadpo.models.attention_plan import AttentionPlan, Segment
from megadpo.runtime.device import to_device

# Padding attends in short segments, since nobody reads the result and the cost grows with a segment's square.
_PADDING_SEGMENT = 64

Number = TypeVar("Number", int, npt.NDArray[np.int64])


@dataclass(frozen=True, slots=True)
class PreferenceBatch:
    """Packed sequences of B pairs (0 in a filler, which keeps the ranks' collectives in step).

    `response_rows_N` are the rows whose hidden states predict response tokens, `targets_N` those tokens,
    `sequence_index_N` the sequences that they belong to. All three are ordered pair by pair, with a pair's chosen
    response before its rejected one. `pair_indices` are the pairs' rows in the source, `pair_digests` hashes of their
    token ids. Rows after the last sequence are padding in segments of their own.
    """

    tokens_1T: torch.Tensor
    positions_T: torch.Tensor
    plan: AttentionPlan
    response_rows_N: torch.Tensor
    targets_N: torch.Tensor
    sequence_index_N: torch.Tensor
    response_tokens_S: torch.Tensor
    pair_indices: tuple[int, ...]
    pair_digests: tuple[bytes, ...]

    @property
    def num_pairs(self) -> int:
        """The number of pairs, B."""
        return len(self.pair_indices)

    def to(self, torch_device: torch.device) -> PreferenceBatch:
        """The same batch with its tensors on `torch_device`."""
        return PreferenceBatch(
            tokens_1T=to_device(self.tokens_1T, torch_device),
            positions_T=to_device(self.positions_T, torch_device),
            plan=self.plan,
            response_rows_N=to_device(self.response_rows_N, torch_device),
            targets_N=to_device(self.targets_N, torch_device),
            sequence_index_N=to_device(self.sequence_index_N, torch_device),
            response_tokens_S=to_device(self.response_tokens_S, torch_device),
            pair_indices=self.pair_indices,
            pair_digests=self.pair_digests,
        )


def stream_tokens(prompt: Number, chosen: Number, rejected: Number, *, share_prompt: bool) -> Number:
    """Number of tokens in the stream of a pair with these lengths: its prompt counts once, or before each response."""
    return prompt + chosen + rejected if share_prompt else 2 * prompt + chosen + rejected


def stream_length(pair: TokenizedPair, *, share_prompt: bool) -> int:
    """Number of tokens of a pair in a stream."""
    return stream_tokens(len(pair.prompt), len(pair.chosen), len(pair.rejected), share_prompt=share_prompt)


def build_batch(
    pairs: Sequence[TokenizedPair], *, num_tokens: int, pad_token_id: int, share_prompt: bool
) -> PreferenceBatch:
    """Builds the batch of `pairs` in a stream of `num_tokens` rows, padded at its end with masked segments.

    With `share_prompt` a pair is prompt · chosen · rejected, where rejected sees the prompt and itself and its
    positions continue from the prompt's; without, it is two sequences, prompt · chosen and prompt · rejected.
    """
    stream = _Stream()
    for index, pair in enumerate(pairs):
        if not len(pair.prompt):
            raise ValueError(f"pair {pair.index} has no prompt token, so nothing predicts its responses' first ones")
        _add_pair(stream, pair, (index, len(pairs) + index), share_prompt=share_prompt)
    padding = num_tokens - stream.length
    if padding < 0:
        raise ValueError(f"{stream.length} tokens do not fit a stream of {num_tokens}")
    if padding:
        first = stream.append(np.full(padding, pad_token_id), first_position=0)
        for start in range(first, num_tokens, _PADDING_SEGMENT):
            own = (start, min(start + _PADDING_SEGMENT, num_tokens))
            stream.segments.append(Segment(*own, key_ranges=(own,)))
    response_tokens = [len(pair.chosen) for pair in pairs] + [len(pair.rejected) for pair in pairs]
    return PreferenceBatch(
        tokens_1T=_joined(stream.tokens)[None],
        positions_T=_joined(stream.positions),
        plan=AttentionPlan(num_tokens=num_tokens, segments=tuple(stream.segments)),
        response_rows_N=_joined(stream.response_rows),
        targets_N=_joined(stream.targets),
        sequence_index_N=_joined(stream.sequence_index),
        response_tokens_S=torch.tensor(response_tokens, dtype=torch.long),
        pair_indices=tuple(pair.index for pair in pairs),
        pair_digests=tuple(pair.digest for pair in pairs),
    )


class _Stream:
    """A growing stream: pieces of a PreferenceBatch's fields, to be concatenated at the end."""

    def __init__(self) -> None:
        self.length = 0
        self.tokens: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.segments: list[Segment] = []
        self.response_rows: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.sequence_index: list[np.ndarray] = []

    def append(self, ids: np.ndarray, *, first_position: int) -> int:
        """Adds tokens with ascending positions; returns the row of the first one."""
        start = self.length
        self.tokens.append(ids)
        self.positions.append(np.arange(first_position, first_position + len(ids)))
        self.length += len(ids)
        return start


def _add_pair(stream: _Stream, pair: TokenizedPair, sequences: tuple[int, int], *, share_prompt: bool) -> None:
    prompt: tuple[int, int] | None = None
    for sequence, response in zip(sequences, (pair.chosen, pair.rejected), strict=True):
        start, shared = stream.length, () if prompt is None or not share_prompt else (prompt,)
        if prompt is None or not share_prompt:
            stream.append(pair.prompt, first_position=0)
            prompt = (start, stream.length)
        response_start = stream.append(response, first_position=len(pair.prompt))
        own = (start, stream.length)
        stream.segments.append(Segment(*own, key_ranges=(*shared, own)))
        # The prompt's last row predicts the first token of each response that follows it.
        rows = np.arange(response_start - 1, stream.length - 1)
        rows[0] = prompt[1] - 1
        stream.response_rows.append(rows)
        stream.targets.append(response)
        stream.sequence_index.append(np.full(len(response), sequence))


def _joined(pieces: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *pieces]).astype(np.int64, copy=False))
