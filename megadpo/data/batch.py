"""One microbatch as the model sees it: a packed stream of tokens and what its rows mean.

Legend: T tokens of the stream, N response rows, B pairs, S = 2·B sequences (chosen of pair i is i, rejected is B + i).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from megadpo.attention_plan import AttentionPlan, packed_plan
from megadpo.data.tokenization import TokenizedPair

Number = TypeVar("Number", int, npt.NDArray[np.int64])


@dataclass(frozen=True, slots=True)
class PreferenceBatch:
    """Packed sequences of B pairs (B may be 0: a filler that keeps the collectives in step).

    `response_rows_N` are the rows whose hidden state predicts a response token, `targets_N` those tokens,
    `sequence_index_N` the sequence each belongs to, `pair_indices` the pairs' rows in the source. Rows behind the last
    sequence are padding in a segment of their own.
    """

    tokens_1T: torch.Tensor
    positions_T: torch.Tensor
    plan: AttentionPlan
    response_rows_N: torch.Tensor
    targets_N: torch.Tensor
    sequence_index_N: torch.Tensor
    response_tokens_S: torch.Tensor
    pair_indices: tuple[int, ...]

    @property
    def num_pairs(self) -> int:
        """B."""
        return len(self.pair_indices)

    def to(self, device: torch.device) -> PreferenceBatch:
        """The same batch with its tensors on `device` ."""
        return PreferenceBatch(
            tokens_1T=self.tokens_1T.to(device),
            positions_T=self.positions_T.to(device),
            plan=self.plan,
            response_rows_N=self.response_rows_N.to(device),
            targets_N=self.targets_N.to(device),
            sequence_index_N=self.sequence_index_N.to(device),
            response_tokens_S=self.response_tokens_S.to(device),
            pair_indices=self.pair_indices,
        )


def stream_tokens(prompt: Number, chosen: Number, rejected: Number) -> Number:
    """Tokens that a pair of such lengths takes in a stream: prompt · chosen, then prompt · rejected."""
    return 2 * prompt + chosen + rejected


def stream_length(pair: TokenizedPair) -> int:
    """Tokens that a pair takes in a stream."""
    return stream_tokens(len(pair.prompt), len(pair.chosen), len(pair.rejected))


def build_batch(pairs: Sequence[TokenizedPair], *, num_tokens: int, pad_token_id: int) -> PreferenceBatch:
    """The batch of `pairs` in a stream of `num_tokens` rows, the surplus filled with a masked tail segment.

    Every sequence is prompt · response with positions from 0; a response token at row r is predicted by row r − 1.
    """
    tokens: list[int] = []
    positions: list[int] = []
    lengths: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    sequence_index: list[int] = []
    response_tokens = [len(pair.chosen) for pair in pairs] + [len(pair.rejected) for pair in pairs]
    for pair_index, pair in enumerate(pairs):
        if not len(pair.prompt):
            raise ValueError(f"pair {pair.index} has no prompt token, so nothing predicts its responses' first ones")
        for sequence, response in ((pair_index, pair.chosen), (len(pairs) + pair_index, pair.rejected)):
            first = len(tokens) + len(pair.prompt) - 1
            rows.extend(range(first, first + len(response)))
            targets.extend(response.tolist())
            sequence_index.extend([sequence] * len(response))
            length = len(pair.prompt) + len(response)
            tokens.extend(pair.prompt.tolist())
            tokens.extend(response.tolist())
            positions.extend(range(length))
            lengths.append(length)
    padding = num_tokens - len(tokens)
    if padding < 0:
        raise ValueError(f"{len(tokens)} tokens do not fit a stream of {num_tokens}")
    if padding:
        tokens.extend([pad_token_id] * padding)
        positions.extend(range(padding))
        lengths.append(padding)
    return PreferenceBatch(
        tokens_1T=torch.tensor([tokens], dtype=torch.long),
        positions_T=torch.tensor(positions, dtype=torch.long),
        plan=packed_plan(lengths),
        response_rows_N=torch.tensor(rows, dtype=torch.long),
        targets_N=torch.tensor(targets, dtype=torch.long),
        sequence_index_N=torch.tensor(sequence_index, dtype=torch.long),
        response_tokens_S=torch.tensor(response_tokens, dtype=torch.long),
        pair_indices=tuple(pair.index for pair in pairs),
    )
