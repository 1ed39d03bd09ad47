"""Fused linear + vocab-parallel log-probabilities, without ever holding all logits.

Legend: N response rows, H hidden size, V vocabulary slice of this tensor-parallel rank, C rows of one chunk.

Each rank multiplies a chunk of rows with its slice of the head, keeps the rows' local maximum, sum of exponentials and
target logit in fp32, and reuses the chunk's memory for the next one. Two small all-reduces combine the slices. The
backward recomputes the chunks, except where there was only one, which is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

_FP32_BYTES = 4
# Token statistics copy a chunk in this many parts, one after the other.
_PARTS = 16
_LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """Statistics to log of N response tokens, without gradient.

    `entropy_N` (fp32, nats) is that of the distribution over the whole vocabulary. `is_top1_N` (bool) is True where the
    target is the most likely token (the first of equals).
    """

    entropy_N: torch.Tensor
    is_top1_N: torch.Tensor


@dataclass(frozen=True, slots=True)
class TokenScores:
    """log p(target) of N response tokens as fp32 [N] with gradient, and their statistics if requested."""

    logps_N: torch.Tensor
    statistics: TokenStatistics | None


@dataclass(frozen=True, slots=True)
class _VocabSlice:
    """A rank's slice of the vocabulary: its first token id is `start`, and `real` of its rows are no padding."""

    group: dist.ProcessGroup
    start: int
    real: int


def response_log_probs(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    group: dist.ProcessGroup,
    vocab_start: int,
    vocab_size: int,
    logits_bytes: int,
    token_statistics: bool = False,
) -> TokenScores:
    """log p(target) of each row as fp32 [N], differentiable in `hidden_NH` and `weight_VH`.

    `weight_VH` is the rank's rows [vocab_start, vocab_start + V) of the head; rows from `vocab_size` on are padding and
    get no probability. `hidden_NH` is replicated over `group`; its gradient is the rank's own contribution, which
    the caller sums over the group (by the reduce-scatter or all-reduce that matches how it was replicated). The
    gradient of a weight inside Megatron's DDP goes straight into its fp32 `main_grad`. Targets must lie in
    [0, vocab_size), which is checked when the data are loaded. All memory beside the results and the rows' gradient
    fits into `logits_bytes` (or one row, if that is more). Collectives in the forward: one max all-reduce of [N] and
    one sum all-reduce of [2, N] over `group`, [4, N] with `token_statistics`. None in the backward.
    """
    real = min(max(vocab_size - vocab_start, 0), weight_VH.shape[0])
    rows = chunk_rows(weight_VH.shape[0], dtype=weight_VH.dtype, logits_bytes=logits_bytes)
    has_backward = torch.is_grad_enabled() and (hidden_NH.requires_grad or weight_VH.requires_grad)
    logps_N, entropy_N, is_top1_N = _ResponseLogProbs.apply(
        hidden_NH,
        weight_VH,
        targets_N,
        _VocabSlice(group, vocab_start, real),
        rows,
        token_statistics,
        has_backward and hidden_NH.shape[0] <= rows,
    )
    return TokenScores(logps_N, TokenStatistics(entropy_N, is_top1_N) if token_statistics else None)


def chunk_rows(vocab: int, *, dtype: torch.dtype, logits_bytes: int) -> int:
    """Number of rows whose logits over `vocab` columns fit into `logits_bytes`, at least 1; equal on a group's ranks.

    A logit takes an fp32 number, and one in the model's format if that is another. The partial copy that token
    statistics make is always counted, so that switching them on changes nothing else.
    """
    logit_bytes = _FP32_BYTES + (0 if dtype is torch.float32 else dtype.itemsize)
    return max(1, (logits_bytes - vocab * _FP32_BYTES) * _PARTS // (vocab * (logit_bytes * _PARTS + _FP32_BYTES)))


class _Workspace:
    """Memory of one chunk's logits, in fp32 and also in the head's format if that is another; reused by every chunk."""

    def __init__(self, rows: int, weight_VH: torch.Tensor) -> None:
        vocab, hidden = weight_VH.shape
        # The second bound is one row of `add_product`, for heads with a larger hidden size than vocabulary.
        self.fp32 = weight_VH.new_empty(max(rows * vocab, 2 * hidden), dtype=torch.float32)
        self.low = None if weight_VH.dtype is torch.float32 else weight_VH.new_empty(rows * vocab)

    def view(self, rows: int, vocab: int) -> torch.Tensor:
        """The fp32 numbers as [rows, vocab]."""
        return self.fp32[: rows * vocab].view(rows, vocab)

    def logits(self, hidden_CH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
        """Returns fp32 logits [C, V] that have been rounded to the head's format."""
        logits_CV = self.view(hidden_CH.shape[0], weight_VH.shape[0])
        if self.low is None:
            return torch.mm(hidden_CH, weight_VH.T, out=logits_CV)
        low_CV = self.low[: logits_CV.numel()].view_as(logits_CV)
        return logits_CV.copy_(torch.mm(hidden_CH, weight_VH.T, out=low_CV))

    def in_head_format(self, values_CV: torch.Tensor) -> torch.Tensor:
        """Rounds `values_CV` to the head's format; if that is not fp32, the fp32 memory is free afterwards."""
        if self.low is None:
            return values_CV
        return self.low[: values_CV.numel()].view_as(values_CV).copy_(values_CV)

    def add_product(self, total_VH: torch.Tensor, grad_CV: torch.Tensor, hidden_CH: torch.Tensor) -> None:
        """Adds gradᵀ · hidden to the fp32 `total_VH` in place; a product in a lower format needs no further memory.

        That product is computed in tiles of vocabulary rows which fit, with their fp32 copies, into the memory of the
        fp32 logits.
        """
        if self.low is None:
            total_VH.addmm_(grad_CV.T, hidden_CH)
            return
        hidden = hidden_CH.shape[1]
        rows = self.fp32.numel() * _FP32_BYTES // (hidden * (_FP32_BYTES + self.low.itemsize))
        for start in range(0, total_VH.shape[0], rows):
            tile = total_VH[start : start + rows]
            copy = self.fp32[: tile.numel()].view_as(tile)
            product = self.fp32[tile.numel() :].view(self.low.dtype)[: tile.numel()].view_as(tile)
            torch.mm(grad_CV[:, start : start + rows].T, hidden_CH, out=product)
            tile += copy.copy_(product)


def _chunks(num_rows: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


class _ResponseLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        targets_N: torch.Tensor,
        vocab: _VocabSlice,
        rows: int,
        token_statistics: bool,
        keep: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        local_targets_N = targets_N - vocab.start
        is_local_N = (local_targets_N >= 0) & (local_targets_N < vocab.real)
        local_targets_N = torch.where(is_local_N, local_targets_N, 0)
        rows = max(1, min(rows, hidden_NH.shape[0]))
        space = _Workspace(rows, weight_VH)
        sums = _RowSums(hidden_NH, token_statistics)
        for chunk in _chunks(hidden_NH.shape[0], rows) if vocab.real else []:
            logits_CV = space.logits(hidden_NH[chunk], weight_VH[: vocab.real])
            sums.add_chunk(chunk, logits_CV, local_targets_N[chunk], is_local_N[chunk])
        local_max_N = sums.max_N
        sums.combine(vocab, targets_N)
        log_normaliser_N = sums.max_N + sums.exp_N.log()

        ctx.save_for_backward(hidden_NH, weight_VH, local_targets_N, is_local_N, local_max_N, log_normaliser_N)
        ctx.vocab, ctx.rows, ctx.space = vocab, rows, space if keep else None
        if not token_statistics:
            return sums.target_N - log_normaliser_N, None, None
        entropy_N, is_top1_N = sums.entropy(), sums.is_top1()
        ctx.mark_non_differentiable(entropy_N, is_top1_N)
        return sums.target_N - log_normaliser_N, entropy_N, is_top1_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad_N = grad_outputs[0]
        hidden_NH, weight_VH, local_targets_N, is_local_N, local_max_N, log_normaliser_N = ctx.saved_tensors
        real_VH = weight_VH[: ctx.vocab.real]
        # A kept chunk is overwritten here, so a second backward recomputes it.
        space, ctx.space = ctx.space, None
        is_kept = space is not None
        if space is None:
            space = _Workspace(ctx.rows, weight_VH)
        grad_hidden_NH = torch.zeros_like(hidden_NH)
        weight_gradient = _WeightGradient(weight_VH) if ctx.needs_input_grad[1] else None
        # d log p(target) / d logit = [target] − softmax, and softmax = exp(logit − max) · exp(max − normaliser)
        scale_N = -grad_N * (local_max_N - log_normaliser_N).exp_()
        own_N = torch.where(is_local_N, grad_N, 0.0)
        for chunk in _chunks(hidden_NH.shape[0], ctx.rows) if ctx.vocab.real else []:
            if is_kept:
                grad_CV = space.view(hidden_NH.shape[0], ctx.vocab.real)
            else:
                grad_CV = space.logits(hidden_NH[chunk], real_VH).sub_(local_max_N[chunk, None]).exp_()
            grad_CV.mul_(scale_N[chunk, None]).scatter_add_(1, local_targets_N[chunk, None], own_N[chunk, None])
            grad_CV = space.in_head_format(grad_CV)
            torch.mm(grad_CV, real_VH, out=grad_hidden_NH[chunk])
            if weight_gradient is not None:
                space.add_product(weight_gradient.total_VH[: ctx.vocab.real], grad_CV, hidden_NH[chunk])
        grad_weight_VH = None if weight_gradient is None else weight_gradient.autograd_gradient()
        return grad_hidden_NH, grad_weight_VH, None, None, None, None, None


class _RowSums:
    """The sums behind the rows' log-probs, fp32 [N] each: first over this rank's slice, then over the vocabulary.

    `max_N`; relative to it `exp_N` = Σ exp(logit − max); `target_N`, the target's logit; for token statistics also
    `shifted_N` = Σ exp(logit − max)·(logit − max), and `earlier_N`, the number of slices that hold the maximum before
    the target.
    """

    def __init__(self, hidden_NH: torch.Tensor, token_statistics: bool) -> None:
        num_rows = hidden_NH.shape[0]
        # A slice of padding only has no maximum; with this floor exp(−inf − max) is zero instead of NaN.
        self.max_N = hidden_NH.new_full((num_rows,), _LOWEST, dtype=torch.float32)
        self.rows = hidden_NH.new_zeros(4 if token_statistics else 2, num_rows, dtype=torch.float32)
        self.exp_N, self.target_N = self.rows[0], self.rows[1]
        self.first_max_N = hidden_NH.new_zeros(num_rows, dtype=torch.long) if token_statistics else None

    def add_chunk(
        self, chunk: slice, logits_CV: torch.Tensor, targets_C: torch.Tensor, is_local_C: torch.Tensor
    ) -> None:
        """Adds a chunk's logits, and overwrites them with exp(logit − max)."""
        if self.first_max_N is None:
            self.max_N[chunk] = logits_CV.amax(dim=-1)
        else:
            self.max_N[chunk], self.first_max_N[chunk] = logits_CV.max(dim=-1)
        target_C = logits_CV.gather(1, targets_C[:, None]).squeeze(1)
        self.target_N[chunk] = torch.where(is_local_C, target_C, 0.0)
        logits_CV.sub_(self.max_N[chunk, None])
        if self.first_max_N is None:
            logits_CV.exp_()
        else:
            self.rows[2, chunk] = _exponentiate(logits_CV)
        self.exp_N[chunk] = logits_CV.sum(dim=-1)

    def combine(self, vocab: _VocabSlice, targets_N: torch.Tensor) -> None:
        """Turns the sums over this rank's slice into those over the vocabulary: one max and one sum all-reduce."""
        is_shared = vocab.group.size() > 1 and targets_N.numel() > 0
        local_max_N = self.max_N
        if is_shared:
            self.max_N = local_max_N.clone()
            dist.all_reduce(self.max_N, op=dist.ReduceOp.MAX, group=vocab.group)
        shift_N = local_max_N - self.max_N
        if self.first_max_N is not None:
            self.rows[2] += shift_N * self.exp_N
            self.rows[2] *= shift_N.exp()
            self.rows[3] = (shift_N == 0) & (vocab.start + self.first_max_N < targets_N)
        self.exp_N *= shift_N.exp_()
        if is_shared:
            dist.all_reduce(self.rows, group=vocab.group)

    def entropy(self) -> torch.Tensor:
        """log Σ exp(logit) − E[logit], nats."""
        return self.exp_N.log() - self.rows[2] / self.exp_N

    def is_top1(self) -> torch.Tensor:
        """True where the target is the most likely token (the first of equals)."""
        return (self.target_N >= self.max_N) & (self.rows[3] == 0)


def _exponentiate(shifted_CV: torch.Tensor) -> torch.Tensor:
    """Returns Σ exp(x)·x of each row [C], and overwrites x with exp(x)."""
    sums = []
    for part in shifted_CV.split(-(-shifted_CV.shape[0] // _PARTS)):
        shifted = part.clone()
        sums.append(torch.linalg.vecdot(part.exp_(), shifted))
    return torch.cat(sums)


class _WeightGradient:
    """The fp32 sum of a weight's gradient: Megatron's `main_grad` if its DDP has given the weight one.

    The protocol is that of Megatron's gradient accumulation fusion: `grad_added_to_main_grad` is set, and the gradient
    returned to autograd is a filler that DDP's hook discards. Only if the weight has a second use in the same chunk
    (`zero_out_wgrad`: tied embeddings) the hook adds autograd's sum, so that the filler must be zero.
    """

    def __init__(self, weight_VH: Any) -> None:
        self.weight = weight_VH
        self.is_megatrons = hasattr(weight_VH, "main_grad") and weight_VH.main_grad.dtype is torch.float32
        self.total_VH: torch.Tensor = (
            weight_VH.main_grad if self.is_megatrons else torch.zeros_like(weight_VH, dtype=torch.float32)
        )

    def autograd_gradient(self) -> torch.Tensor:
        """The gradient for autograd, in the weight's format."""
        if not self.is_megatrons:
            return self.total_VH.to(self.weight.dtype)
        self.weight.grad_added_to_main_grad = True
        filler_VH: torch.Tensor = (
            torch.zeros_like(self.weight)
            if getattr(self.weight, "zero_out_wgrad", False)
            else torch.empty_like(self.weight)
        )
        return filler_VH


def sequence_sums(values_N: torch.Tensor, lengths_S: torch.Tensor) -> torch.Tensor:
    """Sums of S consecutive sequences' token values as fp64 [S], deterministically.

    fp32 would lose 1e-3 at sums of −8 000. The lengths must add up to N; checking it on a GPU would have the host wait.
    """
    return torch.segment_reduce(values_N.double(), "sum", lengths=lengths_S, unsafe=True, initial=0.0)
