"""Which pairs a step sees is a function of seed, epoch and step; how they are laid out is the layout's business."""

from __future__ import annotations

import numpy as np
import pytest

from megadpo.data.loader import (
    START,
    BatchBuilder,
    BatchShape,
    Cursor,
    GlobalBatch,
    TrainingData,
    epoch_order,
    evaluation_batches,
    steps_per_epoch,
)
from megadpo.data.tokenization import TokenizedPair
from megadpo.metrics.flops import FlopRates, pair_flops

RATES = FlopRates(per_token=10, per_key=1, per_response_token=5)
REFERENCE_RATES = FlopRates(per_token=100, per_key=3, per_response_token=7)


def make_pairs(count: int) -> list[TokenizedPair]:
    """Pairs of different lengths; the index in the source is not the position in the list."""
    rng = np.random.default_rng(0)
    return [
        TokenizedPair(100 + i, *(rng.integers(3, 90, size=n, dtype=np.int32) for n in rng.integers(1, 15, size=3)))
        for i in range(count)
    ]


def builder(
    *,
    rank: int = 0,
    size: int = 1,
    multiple: int = 1,
    fixed: bool = False,
    microbatches: int = 1,
    budget: int = 64,
    share_prompt: bool = False,
) -> BatchBuilder:
    shape = BatchShape(
        data_rank=rank,
        data_size=size,
        token_multiple=multiple,
        fixed_streams=fixed,
        microbatch_multiple=microbatches,
    )
    return BatchBuilder(
        shape=shape,
        tokens_per_microbatch=budget,
        pad_token_id=2,
        share_prompt=share_prompt,
        flop_rates=RATES,
        reference_flop_rates=REFERENCE_RATES,
    )


def stream_length(pair: TokenizedPair) -> int:
    return 2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


def training_data(
    pairs: list[TokenizedPair],
    *,
    batch: int = 4,
    seed: int = 0,
    shuffle: bool = True,
    start: Cursor = START,
    **layout: int,
) -> TrainingData:
    return TrainingData(
        pairs, global_batch_size=batch, seed=seed, shuffle=shuffle, builder=builder(**layout), start=start
    )


def widths(batch: GlobalBatch) -> list[int]:
    return [microbatch.tokens_1T.shape[1] for microbatch in batch.microbatches]


@pytest.mark.parametrize(
    ("epoch", "first_ten"),
    [(0, [4, 19, 6, 2, 13, 16, 3, 11, 10, 8]), (1, [10, 0, 15, 13, 9, 4, 1, 19, 7, 11])],
)
def test_order_never_changes(epoch: int, first_ten: list[int]) -> None:
    """A run that was started with an older version resumes at the same pairs."""
    order = epoch_order(20, seed=0, epoch=epoch, shuffle=True)
    assert order[:10].tolist() == first_ten
    assert sorted(order.tolist()) == list(range(20))


def test_order_depends_on_seed_and_epoch() -> None:
    orders = {(s, e): tuple(epoch_order(20, seed=s, epoch=e, shuffle=True)) for s in (0, 1) for e in (0, 1)}
    assert len(set(orders.values())) == 4


def test_without_shuffling_every_epoch_is_in_file_order() -> None:
    assert epoch_order(5, seed=3, epoch=2, shuffle=False).tolist() == [0, 1, 2, 3, 4]
    pairs = make_pairs(5)
    data = training_data(pairs, batch=2, shuffle=False)
    assert [data.batch_after(done).pair_indices for done in range(4)] == [(100, 101), (102, 103), (104,), (100, 101)]


def test_an_epoch_visits_every_pair_once_in_its_order() -> None:
    pairs = make_pairs(10)
    data = training_data(pairs, batch=4)
    for epoch in (0, 1):
        batches = [data.batch_after(3 * epoch + step) for step in range(3)]
        assert [len(batch.pair_indices) for batch in batches] == [4, 4, 2]
        visited = [index for batch in batches for index in batch.pair_indices]
        assert visited == [100 + int(i) for i in epoch_order(10, seed=0, epoch=epoch, shuffle=True)]


@pytest.mark.parametrize(("pairs", "batch", "steps"), [(10, 4, 3), (8, 4, 2), (3, 4, 1), (4, 1, 4)])
def test_steps_per_epoch(pairs: int, batch: int, steps: int) -> None:
    assert steps_per_epoch(pairs, batch) == steps
    sizes = {"num_pairs": pairs, "global_batch_size": batch}
    assert Cursor().steps_of(2, **sizes) == 2 * steps
    assert Cursor().after(2 * steps, **sizes) == Cursor(2 * steps, 2 * pairs)


@pytest.mark.parametrize("stopped", range(8))
def test_the_same_pairs_follow_wherever_a_run_goes_on(stopped: int) -> None:
    pairs = make_pairs(10)
    whole = training_data(pairs, batch=4)
    resumed = training_data(pairs, batch=4, start=Cursor(stopped, whole.pairs_after(stopped)))
    for done in range(stopped, 9):
        assert resumed.batch_after(done).pair_indices == whole.batch_after(done).pair_indices
        assert resumed.epochs_after(done) == whole.epochs_after(done)
    assert resumed.start.steps_of(3, num_pairs=10, global_batch_size=4) == 9


def test_another_batch_size_goes_on_behind_the_last_pair() -> None:
    """Seven of the epoch's ten pairs are taken: three are left of it, then the next begins, cut anew."""
    data = training_data(make_pairs(10), batch=2, start=Cursor(steps=3, pairs=17))
    seen = [data.batch_after(done).pair_indices for done in range(3, 3 + 2 + 5)]
    orders = [[100 + int(i) for i in epoch_order(10, seed=0, epoch=epoch, shuffle=True)] for epoch in (1, 2)]
    assert [len(batch) for batch in seen] == [2, 1, 2, 2, 2, 2, 2]
    assert [index for batch in seen for index in batch] == orders[0][7:] + orders[1]
    assert data.start.steps_of(2, num_pairs=10, global_batch_size=2) == 5
    assert data.start.steps_of(1, num_pairs=10, global_batch_size=2) == 3, "they were gone through already"


def test_epochs_after() -> None:
    data = training_data(make_pairs(10), batch=4)
    assert [data.epochs_after(done) for done in range(7)] == [0.0, 0.4, 0.8, 1.0, 1.4, 1.8, 2.0]


LAYOUTS = {
    "dp2": {"size": 2},
    "dp3": {"size": 3},
    "dp3, more ranks than bins": {"size": 3, "budget": 10**6},
    "tp4": {"size": 1, "multiple": 4},
    "pp2": {"size": 2, "fixed": True},
    "vpp": {"size": 2, "fixed": True, "microbatches": 4, "budget": 10**6},  # one bin: all but one are fillers
    "everything": {"size": 2, "multiple": 2, "fixed": True, "microbatches": 2},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_changes_no_pair_and_no_token(name: str) -> None:
    """Over the ranks every pair comes once; all ranks count alike, and count what is really there."""
    layout = LAYOUTS[name]
    pairs = make_pairs(23)
    by_pair = {pair.index: pair for pair in pairs}
    expected = training_data(pairs, batch=9, budget=layout.get("budget", 64)).batch_after(1)
    batches = [training_data(pairs, batch=9, rank=rank, **layout).batch_after(1) for rank in range(layout["size"])]
    logical = sum(stream_length(by_pair[index]) for index in expected.pair_indices)
    computed = sum(sum(widths(batch)) for batch in batches)
    for batch in batches:
        assert batch.pair_indices == expected.pair_indices
        assert len(batch.pair_indices) == 9
        assert batch.logical_tokens == expected.logical_tokens == logical
        assert batch.computed_tokens == computed
        assert batch.padding_tokens == computed - logical
        assert (batch.flops, batch.reference_flops) == (expected.flops, expected.reference_flops)
        assert batch.stream_tokens == max(width for other in batches for width in widths(other))
        assert len(batch.microbatches) == len(batches[0].microbatches)
        assert len(batch.microbatches) % layout.get("microbatches", 1) == 0
    microbatches = [m.pair_indices for batch in batches for m in batch.microbatches if m.num_pairs]
    assert sorted(microbatches) == sorted(m.pair_indices for m in expected.microbatches)
    assert sorted(index for members in microbatches for index in members) == sorted(expected.pair_indices)


@pytest.mark.parametrize("multiple", [1, 4])
def test_streams_are_as_long_as_their_pairs(multiple: int) -> None:
    """Without a pipeline: rounded up to the multiple and no further; a filler has the least that it can."""
    pairs = make_pairs(3)
    by_pair = {pair.index: pair for pair in pairs}
    for rank in range(4):
        batch = builder(rank=rank, size=4, multiple=multiple, budget=1).build(pairs)
        (microbatch,) = batch.microbatches
        length = sum(stream_length(by_pair[index]) for index in microbatch.pair_indices)
        assert microbatch.tokens_1T.shape[1] == max(multiple, -(-length // multiple) * multiple)
        assert microbatch.num_pairs == (rank < 3)


@pytest.mark.parametrize("multiple", [1, 8])
def test_pipeline_streams_are_as_long_as_the_longest(multiple: int) -> None:
    pairs = make_pairs(6)
    longest = max(map(stream_length, pairs))
    for rank in range(4):
        batch = builder(rank=rank, size=4, multiple=multiple, fixed=True, budget=1).build(pairs)
        assert widths(batch) == [-(-longest // multiple) * multiple] * 2
        assert batch.stream_tokens == widths(batch)[0]
        assert batch.computed_tokens == 8 * widths(batch)[0]


def test_a_batch_of_one_rank_without_rounding_computes_its_logical_tokens() -> None:
    batch = training_data(make_pairs(9), batch=9).batch_after(0)
    assert batch.computed_tokens == batch.logical_tokens
    assert len(batch.microbatches) > 1


def test_sharing_computes_each_prompt_once_and_counts_the_same_logical_tokens() -> None:
    pairs = make_pairs(9)
    separate, shared = (builder(share_prompt=share, budget=80).build(pairs) for share in (False, True))
    assert shared.pair_indices == separate.pair_indices
    assert shared.logical_tokens == separate.logical_tokens == separate.computed_tokens
    assert shared.computed_tokens == separate.computed_tokens - sum(len(pair.prompt) for pair in pairs)
    assert max(widths(shared)) <= 80
    assert len(shared.microbatches) < len(separate.microbatches)


@pytest.mark.parametrize("share_prompt", [False, True])
def test_flops_are_those_of_the_pairs_whatever_is_padded(share_prompt: bool) -> None:
    pairs = make_pairs(6)
    sizes = [(len(pair.prompt), len(pair.chosen), len(pair.rejected)) for pair in pairs]
    batch = builder(share_prompt=share_prompt, multiple=32, fixed=True).build(pairs)
    assert batch.padding_tokens > 0
    assert batch.flops == sum(pair_flops(RATES, *lengths, share_prompt=share_prompt) for lengths in sizes)
    reference = sum(pair_flops(REFERENCE_RATES, *lengths, share_prompt=share_prompt) for lengths in sizes)
    assert batch.reference_flops == reference


def test_the_steps_that_are_left_are_those_of_a_whole_run() -> None:
    data = training_data(make_pairs(10))
    whole, rest = (list(data.batches(steps_done=done, total_steps=7)) for done in (0, 4))
    assert [batch.pair_indices for batch in whole[4:]] == [batch.pair_indices for batch in rest]
    assert [batch.pair_indices for batch in whole] == [data.batch_after(done).pair_indices for done in range(7)]


@pytest.mark.parametrize(("share_prompt", "first_rank"), [(True, [0, 3]), (False, [1, 3])])
def test_microbatches_are_dealt_by_the_flops_of_what_is_computed(share_prompt: bool, first_rank: list[int]) -> None:
    """One bin a pair: long responses cost most when prompts are shared, the longest prompt when it counts twice."""
    lengths = [(2, 100, 100), (130, 2, 2), (60, 2, 2), (1, 1, 1)]
    pairs = [TokenizedPair(i, *(np.ones(n, dtype=np.int32) for n in sizes)) for i, sizes in enumerate(lengths)]
    batches = [builder(rank=rank, size=2, budget=1, share_prompt=share_prompt).build(pairs) for rank in range(2)]
    dealt = [sorted(i for m in batch.microbatches for i in m.pair_indices) for batch in batches]
    assert dealt == [first_rank, [i for i in range(4) if i not in first_rank]]


def test_padding_takes_the_pad_token() -> None:
    batch = builder(multiple=64, budget=1).build(make_pairs(1))
    assert batch.microbatches[0].tokens_1T[0, -1] == 2


def test_evaluation_visits_every_pair_once_in_file_order() -> None:
    pairs = make_pairs(10)
    batches = list(evaluation_batches(pairs, group_size=4, builder=builder()))
    assert [len(batch.pair_indices) for batch in batches] == [4, 4, 2]
    assert [index for batch in batches for index in batch.pair_indices] == [pair.index for pair in pairs]


def test_a_batch_knows_the_mean_length_of_the_chosen_responses_that_its_loss_is_a_mean_over() -> None:
    pairs = make_pairs(10)
    lengths = [len(pair.chosen) for pair in pairs]
    first, _, last = evaluation_batches(pairs, group_size=4, builder=builder())
    assert [b.mean_chosen_tokens for b in (first, last)] == [sum(lengths[:4]) / 4, sum(lengths[8:]) / 2]
    whole = evaluation_batches(pairs, group_size=4, builder=builder(), mean_chosen_tokens=7.5)
    assert [batch.mean_chosen_tokens for batch in whole] == [7.5] * 3
