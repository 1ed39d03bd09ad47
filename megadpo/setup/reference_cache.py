"""The cache of a run's reference: completed by a model that is loaded for that only, then looked up.

Rank 0 alone reads and writes the store, and tells the others. Missing pairs are scored in the groups and the order in
which training meets them first, so that in one layout a new cache has, bit for bit, what a live reference computes in
the first epoch.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from megadpo.config.schema import Config
from megadpo.data.loader import BatchBuilder, GlobalBatch, epoch_order
from megadpo.data.prefetch import prefetched
from megadpo.data.store import PairView
from megadpo.data.tokenization import TokenizedPair
from megadpo.errors import CacheError
from megadpo.forward_step import score_batch
from megadpo.optimizer.build import Policy
from megadpo.reference import CachedReference
from megadpo.reference.agreement import Disagreement, compare, noise_bounds
from megadpo.reference.key import INDEX, differing_parts
from megadpo.reference.store import LogProbs, LogProbStore, open_store, other_keys
from megadpo.runtime.collectives import on_main
from megadpo.runtime.device import Device
from megadpo.runtime.parallel_state import ParallelState
from megadpo.runtime.progress import ProgressBar
from megadpo.runtime.rank_logging import get_logger
from megadpo.setup.datasets import Datasets
from megadpo.setup.models import load_reference_model, reference_key
from megadpo.setup.session import Session

logger = get_logger(__name__)

# Weight files may take long to hash; should rank 0 die, the launcher ends the others.
PATIENCE_S = 86_400.0
# Kept pairs of a set that are computed again at the start of a run.
_SAMPLE = 8
_ROWS_NAMED = 10

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Work:
    """Indices of one set's pairs in it: the groups to score, of as many pairs as training has, and a sample to check.

    Every group has a pair without a record; the pairs of the sample have one.
    """

    groups: list[Indices]
    sample: Indices
    missing: Indices


def build_cached_reference(session: Session, datasets: Datasets, builder: BatchBuilder) -> CachedReference:
    """The kept log-probs of all pairs of a run; missing ones are computed first, by a model that is freed afterwards.

    Collective over all ranks. Raises CacheError, the same on every rank, where the store is damaged or disagrees with
    the model.
    """
    config, state, device = session.config, session.state, session.device
    with ExitStack() as stack:
        stores: list[LogProbStore] = []  # one, on rank 0, and there alone:
        digests: dict[str, list[bytes]] = {}

        def begin() -> dict[str, Work]:
            stores.append(stack.enter_context(open_reference_store(session)))
            digests.update({name: [pair.digest for pair in view] for name, view in datasets.views.items()})
            work = _plan_work(config, digests, stores[0])
            _log_missing(config, datasets, work, stores[0])
            return work

        def values() -> tuple[list[bytes], LogProbs]:
            unique = list(dict.fromkeys(digest for own in digests.values() for digest in own))
            # Read anew, as every later start does: of what two jobs have kept in one moment, the same record counts.
            return unique, LogProbStore(stores[0].directory, stores[0].key).lookup(unique)

        work = on_main(begin, patience_s=PATIENCE_S)
        to_score = sum(len(group) for part in work.values() for group in part.groups)
        if to_score:
            chunks = load_reference_model(session)
            filling = _Filling(chunks, builder, state, device, stores, AgreementCheck(session))
            for name, view in datasets.views.items():
                filling.check_sample(name, view, work[name].sample)
            with ProgressBar("reference log-probs", total=to_score, visible=state.is_main) as bar:
                for name, view in datasets.views.items():
                    filling.fill(name, view, work[name].groups, bar)
            del chunks, filling
            gc.collect()  # a model has cycles
            device.release_cached_memory()
        unique, logps_n4 = on_main(values)
    return CachedReference(unique, logps_n4, is_last_stage=state.is_last_stage, torch_device=device.torch_device)


def check_starting_policy(
    session: Session,
    policy: Policy,
    reference: CachedReference,
    datasets: Datasets,
    builder: BatchBuilder,
) -> None:
    """Compares a sample of the kept log-probs with those of the starting policy, which has the reference's weights.

    So that a complete cache is asked too, without a second model. CacheError on every rank where they are not of the
    same weights.
    """
    agreement = AgreementCheck(session)
    for name, view in datasets.views.items():
        pairs = [view[int(i)] for i in _sample(np.arange(len(view)))]
        logps_n4 = finite_logps(policy.chunks, builder.build(pairs), session.state, session.device)
        found = compare(pairs, reference.kept([pair.digest for pair in pairs]), logps_n4)
        agreement.check(name, partial(_beyond, found))


def _beyond(found: Disagreement, limit: float) -> Disagreement | None:
    return found if found.noise > limit else None


def finite_logps(
    chunks: Sequence[torch.nn.Module], batch: GlobalBatch, state: ParallelState, device: Device
) -> LogProbs:
    """`score_batch`'s log-probs of a reference; CacheError where one is not finite, which must not be kept."""
    logps_n4 = score_batch(chunks, batch, state, device.torch_device)
    if not np.isfinite(logps_n4).all():
        row = batch.pair_indices[int(np.flatnonzero(~np.isfinite(logps_n4).all(axis=1))[0])]
        raise CacheError(
            f"pair {row} (a row of the data, from 0) has no finite log-probs under the reference: look at that pair, "
            "and at the weights (precision.dtype=fp32 rules out overflow)"
        )
    return logps_n4


class AgreementCheck:
    """Decides whether kept log-probs that differ from computed ones are still those of the reference; on all ranks.

    The first time that they differ by more than is usual, the reference's files are read again. Where these are the
    same, differences that rounding can cause are accepted from then on.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        precision = session.config.precision
        self._bounds = noise_bounds(str(precision.dtype), fp8=precision.fp8 is not None)
        self._limit = self._bounds.usual

    def check(self, name: str, attempt: Callable[[float], Disagreement | None]) -> None:
        """Calls `attempt` on rank 0, which does nothing where pairs of the set `name` differ by more than its argument.

        Collective over all ranks; CacheError on each where kept and computed ones are not of the same weights.
        """
        found = on_main(lambda: attempt(self._limit))
        if found is None:
            return
        on_main(lambda: self._explain(name, found), patience_s=PATIENCE_S)
        self._limit = self._bounds.possible
        on_main(lambda: attempt(self._limit))

    def _explain(self, name: str, found: Disagreement) -> None:
        config, bounds = self._session.config, self._bounds
        trusted = reference_key(self._session)
        changed = ", ".join(differing_parts(trusted, reference_key(self._session, trust_index=False)))
        said = (
            f"{config.reference.cache_dir}: row {found.row} of {name} was kept with log-probs {found.kept}, now they "
            f"are {found.computed}. Such rows are off by {found.noise:.2g} nats per root of a token"
        )
        if changed:
            raise CacheError(
                f"{said}. What has changed is {changed}, in files that look as they did: remove {INDEX} there"
            )
        if not found.noise <= bounds.possible:
            raise CacheError(
                f"{said}, rounding by less than {bounds.possible:g}. The reference's files are the same, so a library "
                f"or this program computes otherwise, or another one filled {trusted.digest[:32]}: remove that "
                "directory there"
            )
        logger.warning(
            "%s, more than one layout's rounding (%g). The reference's files are the same: another layout or library "
            "filled it, and it is used",
            said,
            bounds.usual,
        )


def keep(store: LogProbStore, pairs: Sequence[TokenizedPair], logps_n4: LogProbs, limit: float) -> Disagreement | None:
    """Adds pairs' log-probs to the store; instead returns how they disagree with those in it by more than `limit`."""
    found = compare_with_kept(store, pairs, logps_n4, limit)
    if found is None:
        store.append([pair.digest for pair in pairs], logps_n4)
    return found


def compare_with_kept(
    store: LogProbStore, pairs: Sequence[TokenizedPair], logps_n4: LogProbs, limit: float
) -> Disagreement | None:
    """The disagreement with the store's log-probs of the same pairs where it exceeds `limit`; else None."""
    known_n = np.flatnonzero(store.known([pair.digest for pair in pairs]))
    if not len(known_n):
        return None
    known = [pairs[int(i)] for i in known_n]
    kept_n4 = store.lookup([pair.digest for pair in known])
    return _beyond(compare(known, kept_n4, logps_n4[known_n]), limit)


def open_reference_store(session: Session) -> LogProbStore:
    """The store of the reference's log-probs in `reference.cache_dir`; logs which others are there. For one process."""
    cache_dir = Path(str(session.config.reference.cache_dir))
    key = reference_key(session)
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


def _plan_work(config: Config, digests: dict[str, list[bytes]], store: LogProbStore) -> dict[str, Work]:
    """The pairs of each set that must be scored, in the order of training's first epoch, or that of evaluation."""
    train, met, work = config.train, set[bytes](), {}
    for name, own in digests.items():
        order = epoch_order(len(own), seed=train.seed, epoch=0, shuffle=train.shuffle and name == "train")
        known, first = store.known(own), np.zeros(len(own), np.bool_)
        for index in order:
            first[index] = own[index] not in met
            met.add(own[index])
        groups = missing_groups(order, known, first, train.global_batch_size)
        work[name] = Work(groups, _sample(np.flatnonzero(known)), np.flatnonzero(~known))
    return work


def _sample(indices: Indices) -> Indices:
    """A few of the indices, evenly spread."""
    return indices[:: max(1, len(indices) // _SAMPLE)][:_SAMPLE]


def missing_groups(
    order: Indices, known: npt.NDArray[np.bool_], first: npt.NDArray[np.bool_], size: int
) -> list[Indices]:
    """Indices of pairs that are not known, in groups of `size`.

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


def _log_missing(config: Config, datasets: Datasets, work: dict[str, Work], store: LogProbStore) -> None:
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
                ", ".join(str(int(view.rows_n[index])) for index in missing[:_ROWS_NAMED]),
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
        stores: Sequence[LogProbStore],
        agreement: AgreementCheck,
    ) -> None:
        self._chunks = chunks
        self._builder = builder
        self._state = state
        self._device = device
        self._stores = stores  # one, on rank 0
        self._agreement = agreement
        self._done = 0

    def fill(self, name: str, view: PairView, groups: Sequence[Indices], bar: ProgressBar) -> None:
        """Scores and keeps the groups' pairs one group after the other."""
        batches: Iterator[GlobalBatch] = (self._builder.build([view[int(i)] for i in group]) for group in groups)
        with prefetched(batches) as ahead:
            for group, batch in zip(groups, ahead, strict=True):
                logps_n4 = finite_logps(self._chunks, batch, self._state, self._device)
                self._agreement.check(name, partial(self._keep, view, group, logps_n4))
                self._done += len(group)
                bar.update(self._done, f"{self._done} pairs")

    def _keep(self, view: PairView, group: Indices, logps_n4: LogProbs, limit: float) -> Disagreement | None:
        return keep(self._stores[0], [view[int(i)] for i in group], logps_n4, limit)

    def check_sample(self, name: str, view: PairView, sample: Indices) -> None:
        """CacheError where kept pairs have other log-probs under the model than were kept."""
        if not len(sample):
            return
        pairs = [view[int(i)] for i in sample]
        logps_n4 = finite_logps(self._chunks, self._builder.build(pairs), self._state, self._device)
        self._agreement.check(name, lambda limit: compare_with_kept(self._stores[0], pairs, logps_n4, limit))
