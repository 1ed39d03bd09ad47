"""Patches that switch off parts of the program for an ablation, in a contender's process only."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from bench.ablations import Ablation
from megadpo.data.batch import PreferenceBatch
from megadpo.data.loader import GlobalBatch, TrainingData, steps_per_epoch
from megadpo.data.tokenization import TokenizedPair
from megadpo.loss.logprobs import TokenScores
from megadpo.loss.preference import SequenceLogProbs
from megadpo.models.attention_plan import AttentionPlan, Segment
from megadpo.models.policy import ResponseHead
from megadpo.reference import CachedReference, Reference
from megadpo.setup.models import build_reference
from megadpo.setup.session import Session

LogProbsOfPairs = dict[int, tuple[float, float]]


def patches(ablation: Ablation) -> Sequence[AbstractContextManager[Any]]:
    """Patches for parts that are not in use and that the configuration can't switch off; to be entered first."""
    found: list[AbstractContextManager[Any]] = []
    if not ablation.packed:
        found.append(mock.patch("megadpo.data.loader.build_batch", padded_batch))
    if not ablation.fused_head:
        head = naive_head if ablation.response_rows else naive_head_on_all_rows
        found.append(mock.patch.object(ResponseHead, "forward", head))
    return found


def padded_batch(
    pairs: Sequence[TokenizedPair], *, num_tokens: int, pad_token_id: int, share_prompt: bool
) -> PreferenceBatch:
    """Builds the batch of `pairs` with every sequence padded to the longest, one segment each; ignores `num_tokens`."""
    if share_prompt:
        raise ValueError("padded sequences are whole ones: data.share_prompt=false")
    sequences = [(len(pair.prompt), [*pair.prompt, *own]) for pair in pairs for own in (pair.chosen, pair.rejected)]
    width = max(len(ids) for _, ids in sequences)
    count = len(sequences)
    starts = [width * i for i in range(count)]
    tokens = torch.tensor([[*ids, *[pad_token_id] * (width - len(ids))] for _, ids in sequences], dtype=torch.long)
    rows = [torch.arange(s + p - 1, s + len(ids) - 1) for s, (p, ids) in zip(starts, sequences, strict=True)]
    responses = [(len(pair.chosen), len(pair.rejected)) for pair in pairs]
    rows_N = torch.cat(rows)
    segments = tuple(Segment(start, start + width, key_ranges=((start, start + width),)) for start in starts)
    return PreferenceBatch(
        tokens_1T=tokens.view(1, -1),
        positions_T=torch.arange(width).repeat(count),
        plan=AttentionPlan(num_tokens=count * width, segments=segments),
        response_rows_N=rows_N,
        targets_N=tokens.view(-1)[rows_N + 1],
        # Sequence 2·i is pair i's chosen response, which has number i; its rejected one has number B + i.
        sequence_index_N=torch.cat([torch.full((len(r),), i // 2 + i % 2 * len(pairs)) for i, r in enumerate(rows)]),
        response_tokens_S=torch.tensor([chosen for chosen, _ in responses] + [rejected for _, rejected in responses]),
        pair_indices=tuple(pair.index for pair in pairs),
        pair_digests=tuple(pair.digest for pair in pairs),
    )


def naive_head(
    head: ResponseHead,
    hidden_T1H: torch.Tensor,
    response_rows_N: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    token_statistics: bool = False,
) -> TokenScores:
    """log_softmax and gather over the response rows, on one tensor-parallel rank."""
    logps_NV = _log_softmax(head, hidden_T1H.squeeze(1).index_select(0, response_rows_N), weight)
    return TokenScores(logps_NV.gather(1, targets_N[:, None]).squeeze(1), None)


def naive_head_on_all_rows(
    head: ResponseHead,
    hidden_T1H: torch.Tensor,
    response_rows_N: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    token_statistics: bool = False,
) -> TokenScores:
    """log_softmax over every row of the stream, on one tensor-parallel rank; then the response rows are selected."""
    logps_TV = _log_softmax(head, hidden_T1H.squeeze(1), weight)
    return TokenScores(logps_TV[response_rows_N, targets_N], None)


def _log_softmax(head: ResponseHead, rows_NH: torch.Tensor, tied: torch.Tensor | None) -> torch.Tensor:
    logits_NV = torch.nn.functional.linear(rows_NH, head.weight if tied is None else tied)
    return logits_NV[:, : head.vocab_size].float().log_softmax(-1)


class ReferenceTap:
    """Records the log-probs of a run's reference for all pairs; with `cached`, a first pass computes them in advance.

    `logps` holds (chosen, rejected) by the pair's row in the source, `values` all fields by the digest of its tokens.
    """

    def __init__(self, *, cached: bool) -> None:
        self.cached = cached
        self.logps: LogProbsOfPairs = {}
        self.values: dict[bytes, Sequence[float]] = {}
        self._held: list[tuple[PreferenceBatch, SequenceLogProbs]] = []
        self._data: TrainingData | None = None

    def patches(self) -> Sequence[AbstractContextManager[Any]]:
        """Patches with which the run builds its reference through this object."""
        return [
            mock.patch("megadpo.setup.datasets.TrainingData", self._training_data),
            mock.patch("megadpo.commands.train.build_reference", self._build),
        ]

    def _training_data(self, *args: Any, **kwargs: Any) -> TrainingData:
        self._data = TrainingData(*args, **kwargs)
        return self._data

    def _build(self, session: Session, checkpoint: Path | None) -> Reference:
        live = _Live(build_reference(session, checkpoint), self)
        if not self.cached:
            return live
        assert self._data is not None
        for step in range(steps_per_epoch(len(self._data.pairs), self._data.global_batch_size)):
            live.log_probs(self._data.batch_after(step))
        self.write_down()
        rows = np.array(list(self.values.values()), np.float64)
        return CachedReference(list(self.values), rows, is_last_stage=True, torch_device=session.device.torch_device)

    def hold(self, batch: GlobalBatch, logps: Sequence[SequenceLogProbs]) -> None:
        """Holds a step's numbers on their device; stages without a head have none."""
        self._held += list(zip(batch.microbatches, logps, strict=False))

    def write_down(self) -> None:
        """Moves the held numbers to `logps` and `values`."""
        for microbatch, own in self._held:
            rows = own.columns().tolist()
            self.logps.update(zip(microbatch.pair_indices, [(row[0], row[1]) for row in rows], strict=True))
            self.values.update(zip(microbatch.pair_digests, rows, strict=True))
        self._held = []


@dataclass(frozen=True, slots=True)
class _Live:
    inner: Reference
    tap: ReferenceTap

    @property
    def chunks(self) -> Sequence[torch.nn.Module]:
        """The chunks of the inner reference."""
        return self.inner.chunks

    def prepare(self) -> None:
        """Prepares the inner reference."""
        self.inner.prepare()

    def follow(self, policy: Sequence[torch.nn.Module], mix: float) -> None:
        """As the reference behind it."""
        self.inner.follow(policy, mix)

    def saved(self) -> AbstractContextManager[Sequence[torch.nn.Module]]:
        """Those of the reference behind it."""
        return self.inner.saved()

    def device_bytes(self) -> int:
        """The bytes of the inner reference."""
        return self.inner.device_bytes()

    def log_probs(self, batch: GlobalBatch) -> list[SequenceLogProbs]:
        """The log-probs of the inner reference, which are recorded."""
        logps = self.inner.log_probs(batch)
        self.tap.hold(batch, logps)
        return logps
