"""Builds this rank's microbatches from the retained pairs and a step number.

The position in the data is a function of the number of finished steps, and of the position that the run continued from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megadpo.data.batch import PreferenceBatch, build_batch, stream_length
from megadpo.data.schedule import StepSchedule, schedule_step
from megadpo.data.tokenization import TokenizedPair
from megadpo.metrics.flops import FlopRates, pair_flops


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """The pairs of one step over all ranks, and this data-parallel rank's microbatches of them.

    `logical_tokens` counts prompt + chosen + prompt + rejected of every pair; `computed_tokens` counts all tokens that
    the ranks compute, of which `padding_tokens` are padding and fillers. `stream_tokens` is the length of the longest
    microbatch; under a pipeline all have this length. `flops` is that of the policy's forward pass over all pairs,
    `own_flops` over this rank's streams with their padding; `reference_flops` is the reference's. `pair_indices` are
    the pairs' rows in the source, in order. `mean_chosen_tokens` is the mean length of the chosen responses of all
    pairs that the loss is a mean over.
    """

    microbatches: tuple[PreferenceBatch, ...]
    pair_indices: tuple[int, ...]
    logical_tokens: int
    computed_tokens: int
    padding_tokens: int
    stream_tokens: int
    flops: int
    reference_flops: int
    own_flops: int
    mean_chosen_tokens: float


@dataclass(frozen=True, slots=True)
class BatchShape:
    """Requirements of the parallel layout on a batch.

    `token_multiple`: streams are rounded up to it (sequence parallelism splits them evenly). `fixed_streams`: all
    microbatches of a step get one length, because pipeline messages have one shape. `microbatch_multiple`: see
    `schedule_step`.
    """

    data_rank: int
    data_size: int
    token_multiple: int
    fixed_streams: bool
    microbatch_multiple: int


class BatchBuilder:
    """Builds global batches from lists of pairs, for one layout and one token budget.

    `flop_rates` are the policy's, and balance the ranks; `reference_flop_rates` are None if no reference model runs.
    """

    def __init__(
        self,
        *,
        shape: BatchShape,
        tokens_per_microbatch: int,
        pad_token_id: int,
        share_prompt: bool,
        flop_rates: FlopRates,
        reference_flop_rates: FlopRates | None = None,
    ) -> None:
        self.shape = shape
        self.tokens_per_microbatch = tokens_per_microbatch
        self.pad_token_id = pad_token_id
        self.share_prompt = share_prompt
        self.flop_rates = flop_rates
        self.reference_flop_rates = reference_flop_rates

    def build(self, pairs: Sequence[TokenizedPair], *, mean_chosen_tokens: float | None = None) -> GlobalBatch:
        """Builds the global batch of `pairs`: this rank's microbatches, and the token counts of all ranks.

        `mean_chosen_tokens` must be given if the loss is a mean over more pairs than these.
        """
        shape = self.shape
        lengths = [stream_length(pair, share_prompt=self.share_prompt) for pair in pairs]
        flops = [self._flops(self.flop_rates, pair) for pair in pairs]
        schedule = schedule_step(
            lengths,
            flops,
            budget=self.tokens_per_microbatch,
            data_parallel=shape.data_size,
            microbatch_multiple=shape.microbatch_multiple,
        )
        widths = stream_widths(schedule, lengths, shape)
        own_bins = schedule.bins_by_rank[shape.data_rank]
        computed_tokens = sum(map(sum, widths))
        return GlobalBatch(
            microbatches=tuple(
                build_batch(
                    [pairs[i] for i in members],
                    num_tokens=width,
                    pad_token_id=self.pad_token_id,
                    share_prompt=self.share_prompt,
                )
                for members, width in zip(own_bins, widths[shape.data_rank], strict=True)
            ),
            pair_indices=tuple(pair.index for pair in pairs),
            logical_tokens=sum(stream_length(pair, share_prompt=False) for pair in pairs),
            computed_tokens=computed_tokens,
            padding_tokens=computed_tokens - sum(lengths),
            stream_tokens=max(map(max, widths)),
            flops=sum(flops),
            reference_flops=self._reference_flops(pairs),
            own_flops=sum(
                sum(flops[i] for i in members) + self.flop_rates.per_token * (width - sum(lengths[i] for i in members))
                for members, width in zip(own_bins, widths[shape.data_rank], strict=True)
            ),
            mean_chosen_tokens=mean_chosen_tokens or mean_chosen_length(pairs),
        )

    def _reference_flops(self, pairs: Sequence[TokenizedPair]) -> int:
        rates = self.reference_flop_rates
        return 0 if rates is None else sum(self._flops(rates, pair) for pair in pairs)

    def _flops(self, rates: FlopRates, pair: TokenizedPair) -> int:
        lengths = (len(pair.prompt), len(pair.chosen), len(pair.rejected))
        return pair_flops(rates, *lengths, share_prompt=self.share_prompt)


def mean_chosen_length(pairs: Sequence[TokenizedPair]) -> float:
    """Mean number of tokens of the chosen responses."""
    return sum(len(pair.chosen) for pair in pairs) / len(pairs)


def stream_widths(schedule: StepSchedule, lengths: Sequence[int], shape: BatchShape) -> list[list[int]]:
    """Stream lengths of all ranks' microbatches, padding included."""

    def rounded(tokens: int) -> int:
        multiple = shape.token_multiple
        return max(1, -(-tokens // multiple)) * multiple

    if shape.fixed_streams:
        width = rounded(schedule.stream_tokens)
        return [[width] * len(bins) for bins in schedule.bins_by_rank]
    return [[rounded(sum(lengths[i] for i in members)) for members in bins] for bins in schedule.bins_by_rank]


def epoch_order(num_pairs: int, *, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """The order of the retained pairs in an epoch, which depends on (seed, epoch) only.

    NumPy's PCG64 seeded by (seed, epoch) permutes them; without shuffling it is the file's order.
    """
    if not shuffle:
        return np.arange(num_pairs)
    return np.random.Generator(np.random.PCG64((seed, epoch))).permutation(num_pairs)


def steps_per_epoch(num_pairs: int, global_batch_size: int) -> int:
    """Number of optimizer steps of one pass over the pairs."""
    return -(-num_pairs // global_batch_size)


@dataclass(frozen=True, slots=True)
class Cursor:
    """A position in the training pairs: `steps` updates have consumed `pairs` of them, counted over all epochs."""

    steps: int = 0
    pairs: int = 0

    def after(self, steps_done: int, *, num_pairs: int, global_batch_size: int) -> Cursor:
        """The position after `steps_done` updates, which include this cursor's; an epoch's last batch is smaller."""
        steps = steps_done - self.steps
        epoch, offset = divmod(self.pairs, num_pairs)
        steps_left = steps_per_epoch(num_pairs - offset, global_batch_size)
        if steps < steps_left:
            return Cursor(steps_done, self.pairs + steps * global_batch_size)
        epochs, step = divmod(steps - steps_left, steps_per_epoch(num_pairs, global_batch_size))
        return Cursor(steps_done, (epoch + 1 + epochs) * num_pairs + step * global_batch_size)

    def steps_of(self, epochs: int, *, num_pairs: int, global_batch_size: int) -> int:
        """Number of updates after the given number of passes over the pairs."""
        epoch, offset = divmod(self.pairs, num_pairs)
        if epoch >= epochs:
            return self.steps
        rest = steps_per_epoch(num_pairs - offset, global_batch_size)
        return self.steps + rest + (epochs - epoch - 1) * steps_per_epoch(num_pairs, global_batch_size)


START = Cursor()


class TrainingData:
    """The training pairs in the order of (seed, epoch), cut into global batches, an epoch's last one smaller.

    Iteration continues from `start`.
    """

    def __init__(
        self,
        pairs: Sequence[TokenizedPair],
        *,
        global_batch_size: int,
        seed: int,
        shuffle: bool,
        builder: BatchBuilder,
        start: Cursor = START,
    ) -> None:
        self.start = start
        self.pairs = pairs
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.builder = builder
        self._order = (-1, np.empty(0, np.int64))

    def batches(self, *, steps_done: int, total_steps: int) -> Iterator[GlobalBatch]:
        """Yields the global batches of the remaining steps."""
        return map(self.batch_after, range(steps_done, total_steps))

    def batch_after(self, steps_done: int) -> GlobalBatch:
        """The global batch of the step after `steps_done` finished ones."""
        epoch, start = divmod(self.pairs_after(steps_done), len(self.pairs))
        order = self._order_of(epoch)
        return self.builder.build([self.pairs[int(i)] for i in order[start : start + self.global_batch_size]])

    def _order_of(self, epoch: int) -> np.ndarray:
        """`epoch_order`, computed once per epoch: for a million pairs it takes as long as a small step."""
        if self._order[0] != epoch:
            order = epoch_order(len(self.pairs), seed=self.seed, epoch=epoch, shuffle=self.shuffle)
            self._order = (epoch, order)
        return self._order[1]

    def epochs_after(self, steps_done: int) -> float:
        """Number of epochs, with a fraction, after `steps_done` steps."""
        return self.pairs_after(steps_done) / len(self.pairs)

    def pairs_after(self, steps_done: int) -> int:
        """Number of pairs consumed by `steps_done` steps, counted over all epochs."""
        sizes = {"num_pairs": len(self.pairs), "global_batch_size": self.global_batch_size}
        return self.start.after(steps_done, **sizes).pairs


def evaluation_batches(
    pairs: Sequence[TokenizedPair],
    *,
    group_size: int,
    builder: BatchBuilder,
    first: int = 0,
    mean_chosen_tokens: float | None = None,
) -> Iterator[GlobalBatch]:
    """Yields the pairs from `first` on, in file order, as global batches of `group_size`; each pair exactly once.

    For a loss that is a mean over all of them, pass their `mean_chosen_tokens`.
    """
    for start in range(first, len(pairs), group_size):
        yield builder.build(pairs[start : start + group_size], mean_chosen_tokens=mean_chosen_tokens)
