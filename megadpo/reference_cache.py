"""The cache of a run's reference: completed by a model that is there for that only, then looked up.

Rank 0 alone reads and writes the store, and tells the others. Missing pairs are scored in the groups and the order in
which training meets them first, so that in one layout a new cache has, bit for bit, what a live reference computes in
the first epoch.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from megadpo.assembly import load_reference_model, reference_key
from megadpo.config.choices import Dtype
from megadpo.config.schema import Config
from megadpo.data.loader import BatchBuilder, GlobalBatch, epoch_order
from megadpo.data.prefetch import prefetched
from megadpo.data.store import PairView
from megadpo.datasets import Datasets
from megadpo.device import Device
from megadpo.errors import CacheError
from megadpo.forward_step import score_batch
from megadpo.model_source import ModelSource
from megadpo.models.hf_config import Architecture
from megadpo.parallel.collectives import on_main
from megadpo.parallel.state import ParallelState
from megadpo.progress import ProgressBar
from megadpo.rank_logging import get_logger
from megadpo.reference import CachedReference
from megadpo.reference.store import LogProbs, LogProbStore, open_store, other_keys

logger = get_logger(__name__)

# Weight files may take long to hash; should rank 0 die, the launcher ends the others.
PATIENCE_S = 86_400.0
# Kept pairs that are computed again when a model is there anyhow, and how far their log-probs may be off, relatively:
# far above what rounding does, far below what other weights do.
_SAMPLE = 8
_SAMPLE_TOLERANCE = {Dtype.fp32: 1e-4, Dtype.bf16: 2e-2}
_ROWS_NAMED = 10

Places = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Missing:
    """Places of one set's pairs in it: those without a record, in the groups to score them in, and a sample of others.

    `groups` are as many as training or evaluation makes, the last one of pairs whose group is known in part.
    """

    groups: list[Places]
    sample: Places

    @property
    def num_pairs(self) -> int:
        """Pairs to score."""
        return sum(map(len, self.groups))


def build_cached_reference(
    config: Config,
    source: ModelSource,
    arch: Architecture,
    state: ParallelState,
    device: Device,
    datasets: Datasets,
    builder: BatchBuilder,
) -> CachedReference:
    """The kept log-probs of all pairs of a run; what is missing is computed and kept first, by a model that then goes.

    Collective over all ranks. Raises CacheError, the same on every rank, where the store is damaged or disagrees with
    the model.
    """
    with ExitStack() as stack:
        stores: list[LogProbStore] = []  # one, on rank 0, and there alone:
        digests: dict[str, list[bytes]] = {}

        def begin() -> dict[str, Missing]:
            stores.append(stack.enter_context(open_reference_store(config, source)))
            digests.update({name: [pair.digest for pair in view] for name, view in datasets.views.items()})
            return {name: _missing(config, name, stores[0].known(own)) for name, own in digests.items()}

        def values() -> tuple[list[bytes], LogProbs]:
            unique = list(dict.fromkeys(digest for own in digests.values() for digest in own))
            return unique, stores[0].lookup(unique)

        missing = on_main(begin, patience_s=PATIENCE_S)
        to_score = sum(part.num_pairs for part in missing.values())
        if to_score:
            on_main(lambda: _announce(datasets, missing, stores[0]))
            chunks = load_reference_model(config, source, arch, state, device)
            filling = _Filling(config, chunks, builder, state, device, stores)
            for name, view in datasets.views.items():
                filling.check_sample(view, missing[name].sample)
            with ProgressBar("reference log-probs", total=to_score, visible=state.is_main) as bar:
                done = 0
                for name, view in datasets.views.items():
                    filling.fill(view, missing[name].groups, bar, done)
                    done += missing[name].num_pairs
            del chunks, filling
            gc.collect()  # a model has cycles
            device.release_cached_memory()
        pairs, logps_n4 = on_main(values)
    known = dict(zip(pairs, logps_n4.tolist(), strict=True))
    return CachedReference(known, is_last_stage=state.is_last_stage, device=device.torch_device)


def open_reference_store(config: Config, source: ModelSource) -> LogProbStore:
    """The store of the reference's log-probs in `reference.cache_dir`; says what others are there. For one process."""
    cache_dir = Path(str(config.reference.cache_dir))
    key = reference_key(config, source)
    store = open_store(cache_dir, key)
    others = other_keys(cache_dir, key)
    if not len(store) and others:
        nearest = others[0]
        logger.warning(
            "%s holds log-probs of another reference (%s): not used, because of %s",
            cache_dir,
            nearest.directory.name,
            ", ".join(nearest.differences),
        )
    return store


def _missing(config: Config, name: str, known: npt.NDArray[np.bool_]) -> Missing:
    """What is to be scored of a set, in the order of training's first epoch, or that of evaluation."""
    train = config.train
    order = epoch_order(len(known), seed=train.seed, epoch=0, shuffle=train.shuffle and name == "train")
    known_places = np.flatnonzero(known)
    step = max(1, len(known_places) // _SAMPLE)
    return Missing(missing_groups(order, known, train.global_batch_size), known_places[::step][:_SAMPLE])


def missing_groups(order: Places, known: npt.NDArray[np.bool_], size: int) -> list[Places]:
    """Places of pairs that are not known, in groups of `size`.

    A group of `order` of which nothing is known stays as it is; what is missing of the others is put together behind.
    """
    groups, rest = [], []
    for start in range(0, len(order), size):
        group = order[start : start + size]
        left = group[~known[group]]
        if len(left) == len(group):
            groups.append(group)
        else:
            rest.append(left)
    scattered = np.concatenate(rest) if rest else np.empty(0, np.int64)
    return [*groups, *(scattered[start : start + size] for start in range(0, len(scattered), size))]


def _announce(datasets: Datasets, missing: dict[str, Missing], store: LogProbStore) -> None:
    for name, view in datasets.views.items():
        part = missing[name]
        if part.num_pairs:
            known = len(view) - part.num_pairs
            logger.info("%s: %d of %d pairs of %s have log-probs", store.directory, known, len(view), name)
        if 0 < part.num_pairs < len(view):
            places = np.sort(np.concatenate(part.groups))[:_ROWS_NAMED]
            rows = ", ".join(str(int(view.rows_n[place])) for place in places)
            logger.warning(
                "the others' text has changed, or they were never reached: rows %s%s of %s",
                rows,
                " ..." if part.num_pairs > _ROWS_NAMED else "",
                name,
            )


class _Filling:
    """Scores pairs with the reference's model and has rank 0 keep the log-probs."""

    def __init__(
        self,
        config: Config,
        chunks: Sequence[torch.nn.Module],
        builder: BatchBuilder,
        state: ParallelState,
        device: Device,
        stores: Sequence[LogProbStore],
    ) -> None:
        self._precision = config.precision
        self._chunks = chunks
        self._builder = builder
        self._state = state
        self._device = device
        self._stores = stores  # one, on rank 0

    def _score(self, batch: GlobalBatch) -> LogProbs:
        logps_n4 = score_batch(self._chunks, batch, self._state, self._device.torch_device)
        if not np.isfinite(logps_n4).all():
            row = batch.pair_indices[int(np.flatnonzero(~np.isfinite(logps_n4).all(axis=1))[0])]
            raise CacheError(
                f"pair {row} (a row of the data, from 0) has no finite log-probs under the reference: look at that "
                "pair, and at the weights (precision.dtype=fp32 rules out overflow)"
            )
        return logps_n4

    def fill(self, view: PairView, groups: Sequence[Places], bar: ProgressBar, done: int) -> None:
        """Scores and keeps the groups' pairs one group after the other, behind `done` others."""
        batches: Iterator[GlobalBatch] = (self._builder.build([view[int(i)] for i in group]) for group in groups)
        with prefetched(batches) as ahead:
            for group, batch in zip(groups, ahead, strict=True):
                logps_n4 = self._score(batch)
                on_main(self._keep([view[int(i)].digest for i in group], logps_n4))
                done += len(group)
                bar.tell(done, f"{done} pairs")

    def _keep(self, digests: Sequence[bytes], logps_n4: LogProbs) -> Callable[[], None]:
        def keep() -> None:
            self._stores[0].append(digests, logps_n4)

        return keep

    def check_sample(self, view: PairView, sample: Places) -> None:
        """CacheError where a few kept pairs have other log-probs under the model than were kept."""
        if not len(sample):
            return
        pairs = [view[int(i)] for i in sample]
        logps_n4 = self._score(self._builder.build(pairs))
        # FP8 rounds by what shares a microbatch, more coarsely than bf16 does.
        tolerance = _SAMPLE_TOLERANCE[self._precision.dtype] if self._precision.fp8 is None else 5e-2

        def compare() -> None:
            kept_n4 = self._stores[0].lookup([pair.digest for pair in pairs])
            off_n4 = np.abs(logps_n4 - kept_n4) / np.maximum(1.0, np.abs(kept_n4))
            worst = int(off_n4.max(axis=1).argmax())
            if off_n4.max() > tolerance:
                raise CacheError(
                    f"{self._stores[0].directory}: row {pairs[worst].index} was kept with log-probs "
                    f"{kept_n4[worst].tolist()}, the reference now gives {logps_n4[worst].tolist()} (relative "
                    f"tolerance {tolerance:g}). Its key is the same in all parts (weights, config.json, tokenizer, "
                    "chat template, precision, numerics version), so what computes has changed, or a file was replaced "
                    "with its old size and date: remove that directory and files.jsonl beside it"
                )

        on_main(compare)
