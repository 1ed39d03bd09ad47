"""The cache of a run's reference: completed by a model that is there for that only, then looked up.

Rank 0 alone reads and writes the store, and tells the others. Missing pairs are scored in the groups and the order in
which training meets them first, so that in one layout a new cache has, bit for bit, what a live reference computes in
the first epoch.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from megadpo.assembly import load_reference_model, reference_key
from megadpo.config.schema import Config
from megadpo.data.loader import BatchBuilder, GlobalBatch, epoch_order
from megadpo.data.prefetch import prefetched
from megadpo.data.store import PairView
from megadpo.data.tokenization import TokenizedPair
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
from megadpo.reference.agreement import noise_allowed, noise_between
from megadpo.reference.key import INDEX, differing_parts
from megadpo.reference.store import LogProbs, LogProbStore, open_store, other_keys

logger = get_logger(__name__)

# Weight files may take long to hash; should rank 0 die, the launcher ends the others.
PATIENCE_S = 86_400.0
# Kept pairs of a set that are computed again at the start of a run.
_SAMPLE = 8
_ROWS_NAMED = 10

Places = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Work:
    """Places of one set's pairs in it: the groups to score, of as many pairs as training has, and a sample to check.

    Every group has a pair without a record; the pairs of the sample have one.
    """

    groups: list[Places]
    sample: Places
    missing: Places


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
        stores: list[KeptLogProbs] = []  # one, on rank 0, and there alone:
        digests: dict[str, list[bytes]] = {}

        def begin() -> dict[str, Work]:
            stores.append(stack.enter_context(open_kept(config, source)))
            digests.update({name: [pair.digest for pair in view] for name, view in datasets.views.items()})
            work = _plan_work(config, digests, stores[0].store)
            _announce(config, datasets, work, stores[0].store)
            return work

        def values() -> tuple[list[bytes], LogProbs]:
            unique = list(dict.fromkeys(digest for own in digests.values() for digest in own))
            stores[0].store.refresh()  # what other jobs have kept first counts, as it will for later starts
            return unique, stores[0].store.lookup(unique)

        work = on_main(begin, patience_s=PATIENCE_S)
        to_score = sum(len(group) for part in work.values() for group in part.groups)
        if to_score:
            chunks = load_reference_model(config, source, arch, state, device)
            filling = _Filling(chunks, builder, state, device, stores)
            for name, view in datasets.views.items():
                filling.check_sample(name, view, work[name].sample)
            with ProgressBar("reference log-probs", total=to_score, visible=state.is_main) as bar:
                for name, view in datasets.views.items():
                    filling.fill(name, view, work[name].groups, bar)
            del chunks, filling
            gc.collect()  # a model has cycles
            device.release_cached_memory()
        unique, logps_n4 = on_main(values)
    return CachedReference(unique, logps_n4, is_last_stage=state.is_last_stage, device=device.torch_device)


def check_starting_policy(
    config: Config,
    source: ModelSource,
    chunks: Sequence[torch.nn.Module],
    reference: CachedReference,
    datasets: Datasets,
    builder: BatchBuilder,
    state: ParallelState,
    device: Device,
) -> None:
    """Compares a sample of what is kept with what the starting policy computes, whose weights the reference has.

    So that a complete cache is asked too, without a second model. CacheError on every rank where they differ by more
    than rounding.
    """
    for name, view in datasets.views.items():
        pairs = [view[int(i)] for i in _sample(np.arange(len(view)))]
        logps_n4 = score_batch(chunks, builder.build(pairs), state, device.torch_device)
        kept_n4 = reference.kept([pair.digest for pair in pairs])
        on_main(partial(check_agreement, config, source, name, pairs, kept_n4, logps_n4))


def check_agreement(
    config: Config,
    source: ModelSource,
    name: str,
    pairs: Sequence[TokenizedPair],
    kept_n4: LogProbs,
    logps_n4: LogProbs,
) -> None:
    """CacheError where pairs of the set `name` were kept with other log-probs than are computed now; for one process.

    To say why, it reads the reference's files again.
    """
    noise, allowed = noise_between(pairs, kept_n4, logps_n4), noise_allowed(config.precision)
    if noise <= allowed:
        return
    worst = int(np.abs(logps_n4 - kept_n4)[:, :2].max(axis=1).argmax())
    trusted, now = reference_key(config, source), reference_key(config, source, trust_index=False)
    changed = ", ".join(differing_parts(trusted, now))
    raise CacheError(
        f"{config.reference.cache_dir}: row {pairs[worst].index} of {name} was kept with log-probs "
        f"{kept_n4[worst, :2].tolist()}, the reference now gives {logps_n4[worst, :2].tolist()}. Such rows are off by "
        f"{noise:.2g} nats per root of a token, rounding by at most {allowed:g}. "
        + (
            f"What has changed is {changed}, in files that look as they did: remove {INDEX} there"
            if changed
            else f"The reference's files are the same, so a library or this program computes otherwise, or another one "
            f"filled {trusted.digest[:32]}: remove that directory there"
        )
    )


@dataclass(frozen=True, slots=True)
class KeptLogProbs:
    """The store of a run's reference, which takes nothing that contradicts what it has; for one process."""

    config: Config
    source: ModelSource
    store: LogProbStore

    def add(self, name: str, pairs: Sequence[TokenizedPair], logps_n4: LogProbs) -> None:
        """Keeps the log-probs of pairs of the set `name`, after a look at those that are there already."""
        self.check(name, pairs, logps_n4)
        self.store.append([pair.digest for pair in pairs], logps_n4)

    def check(self, name: str, pairs: Sequence[TokenizedPair], logps_n4: LogProbs) -> None:
        """CacheError where pairs are kept with other log-probs than these."""
        known_n = np.flatnonzero(self.store.known([pair.digest for pair in pairs]))
        if len(known_n):
            known = [pairs[int(i)] for i in known_n]
            kept_n4 = self.store.lookup([pair.digest for pair in known])
            check_agreement(self.config, self.source, name, known, kept_n4, logps_n4[known_n])


@contextmanager
def open_kept(config: Config, source: ModelSource) -> Iterator[KeptLogProbs]:
    """The log-probs of the reference in `reference.cache_dir`; says what others are there. For one process."""
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
    with store:
        yield KeptLogProbs(config, source, store)


def _plan_work(config: Config, digests: dict[str, list[bytes]], store: LogProbStore) -> dict[str, Work]:
    """What is to be scored of each set, in the order of training's first epoch, or that of evaluation."""
    train, met, work = config.train, set[bytes](), {}
    for name, own in digests.items():
        order = epoch_order(len(own), seed=train.seed, epoch=0, shuffle=train.shuffle and name == "train")
        known, first = store.known(own), np.zeros(len(own), np.bool_)
        for place in order:
            first[place] = own[place] not in met
            met.add(own[place])
        groups = missing_groups(order, known, first, train.global_batch_size)
        work[name] = Work(groups, _sample(np.flatnonzero(known)), np.flatnonzero(~known))
    return work


def _sample(places: Places) -> Places:
    """A few of the places, from everywhere."""
    return places[:: max(1, len(places) // _SAMPLE)][:_SAMPLE]


def missing_groups(
    order: Places, known: npt.NDArray[np.bool_], first: npt.NDArray[np.bool_], size: int
) -> list[Places]:
    """Places of pairs that are not known, in groups of `size`.

    A group of `order` of which nothing is known stays as it is; what is missing of the others is put together behind.
    A pair that occurs again counts where it is `first`: so after a kill the groups are those of an undisturbed start.
    """
    groups, rest = [], []
    for start in range(0, len(order), size):
        group = order[start : start + size]
        own = group[first[group]]
        left = own[~known[own]]
        if len(left) and len(left) == len(own):
            groups.append(group)
        else:
            rest.append(left)
    scattered = np.concatenate(rest) if rest else np.empty(0, np.int64)
    return [*groups, *(scattered[start : start + size] for start in range(0, len(scattered), size))]


def _announce(config: Config, datasets: Datasets, work: dict[str, Work], store: LogProbStore) -> None:
    if not any(len(part.missing) for part in work.values()):
        pairs = sum(map(len, datasets.views.values()))
        logger.info("%s has the log-probs of all %d pairs: no reference is built", store.directory, pairs)
    for name, view in datasets.views.items():
        missing = work[name].missing
        if not len(missing):
            continue
        logger.info(
            "%s: %d of %d pairs of %s have log-probs", store.directory, len(view) - len(missing), len(view), name
        )
        if len(store):
            logger.warning(
                "the others were never reached, or have other tokens than before (by their text, data.max_length, "
                "data.truncation, or data.template_date=%s): rows %s%s of %s",
                config.data.template_date,
                ", ".join(str(int(view.rows_n[place])) for place in missing[:_ROWS_NAMED]),
                " ..." if len(missing) > _ROWS_NAMED else "",
                name,
            )


class _Filling:
    """Scores pairs with the reference's model and has rank 0 keep the log-probs."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        builder: BatchBuilder,
        state: ParallelState,
        device: Device,
        stores: Sequence[KeptLogProbs],
    ) -> None:
        self._chunks = chunks
        self._builder = builder
        self._state = state
        self._device = device
        self._stores = stores  # one, on rank 0
        self._done = 0

    def _score(self, batch: GlobalBatch) -> LogProbs:
        logps_n4 = score_batch(self._chunks, batch, self._state, self._device.torch_device)
        if not np.isfinite(logps_n4).all():
            row = batch.pair_indices[int(np.flatnonzero(~np.isfinite(logps_n4).all(axis=1))[0])]
            raise CacheError(
                f"pair {row} (a row of the data, from 0) has no finite log-probs under the reference: look at that "
                "pair, and at the weights (precision.dtype=fp32 rules out overflow)"
            )
        return logps_n4

    def fill(self, name: str, view: PairView, groups: Sequence[Places], bar: ProgressBar) -> None:
        """Scores and keeps the groups' pairs one group after the other."""
        batches: Iterator[GlobalBatch] = (self._builder.build([view[int(i)] for i in group]) for group in groups)
        with prefetched(batches) as ahead:
            for group, batch in zip(groups, ahead, strict=True):
                logps_n4 = self._score(batch)
                on_main(partial(self._keep, name, view, group, logps_n4))
                self._done += len(group)
                bar.tell(self._done, f"{self._done} pairs")

    def _keep(self, name: str, view: PairView, group: Places, logps_n4: LogProbs) -> None:
        self._stores[0].add(name, [view[int(i)] for i in group], logps_n4)

    def check_sample(self, name: str, view: PairView, sample: Places) -> None:
        """CacheError where kept pairs have other log-probs under the model than were kept."""
        if not len(sample):
            return
        pairs = [view[int(i)] for i in sample]
        logps_n4 = self._score(self._builder.build(pairs))
        on_main(lambda: self._stores[0].check(name, pairs, logps_n4))
