"""Log-probs of every retained pair under a model, at any layout: one JSON object a pair, in the order of the data.

With a reference its log-probs stand beside them. The two models score one after the other, so that one is in memory at
a time. Until all is complete, each one's lines grow in OUT.jsonl.partial/, beside an identity of models and data: a
scoring that was killed goes on where it stopped, and never under another model. Legend: G pairs of a group.
"""

from __future__ import annotations

import gc
import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from megadpo.commands.score_files import Role, ScoreFiles, ScoreWriter
from megadpo.commands.score_summary import Buckets, bucket_table, read_scores, summarise, with_reference
from megadpo.config.compose import resolve_defaults
from megadpo.config.schema import Config
from megadpo.data.loader import BatchBuilder, GlobalBatch, evaluation_batches
from megadpo.data.prefetch import prefetched
from megadpo.data.store import PairView
from megadpo.errors import MegaDPOError
from megadpo.forward_step import score_batch
from megadpo.models.hf_config import Architecture, read_architecture
from megadpo.reference.agreement import Disagreement
from megadpo.reference.store import LogProbs, LogProbStore
from megadpo.runtime.collectives import check_all_agree, on_main
from megadpo.runtime.device import Device
from megadpo.runtime.parallel_state import ParallelState
from megadpo.runtime.progress import ProgressBar
from megadpo.runtime.rank_logging import get_logger
from megadpo.setup.datasets import Datasets, build_batches, load_datasets, warn_long_sequences
from megadpo.setup.model_source import ModelSource, directory_name, model_source, resolve_model
from megadpo.setup.models import check_weight_files, load_starting_model, weight_files
from megadpo.setup.options import announce, fp8_settings
from megadpo.setup.reference_cache import PATIENCE_S, Judge, keep, open_reference_store
from megadpo.setup.session import open_session

logger = get_logger(__name__)

_TITLES = {Role.policy: "scoring", Role.reference: "scoring with the reference"}


@dataclass(frozen=True, slots=True)
class _Model:
    """A model that scores the pairs; `kept` is the one that a training with this configuration has for reference."""

    role: Role
    name: str
    source: ModelSource
    arch: Architecture
    kept: bool


def run_scoring(config: Config, output: Path, buckets: Buckets | None = None) -> None:
    """Writes `output` and its summary on rank 0; collective over all ranks of the launch. `config` has been validated.

    With `reference.hf_path` that model scores the pairs too. A finished `output` of the same models and data is left as
    it is, and its summary is parted anew where `buckets` are others; another one is a MegaDPOError on every rank.
    """
    files = ScoreFiles(output)
    with open_session(config, partial(_begin, files)) as session:
        _score_all(session.config, files, buckets or Buckets(), session.state, session.device)


def _begin(files: ScoreFiles, config: Config) -> Config:
    """The configuration with everything filled in that scoring needs; validation sets are not scored."""
    files.check_output()
    data = replace(
        config.data,
        validation_path=None,
        validation_fraction=0.0,
        cache_dir=config.data.cache_dir or str(files.tokens),
        # Templates that ask for the date are told the one of the scoring's first start.
        template_date=config.data.template_date or files.known_identity().get("template_date"),
    )
    return resolve_defaults(resolve_model(replace(config, data=data)), datetime.now())


def _score_all(config: Config, files: ScoreFiles, buckets: Buckets, state: ParallelState, device: Device) -> None:
    models = _models(config)
    policy = models[0]
    announce(config, policy.arch, device, trains=False)
    on_main(lambda: check_weight_files(config, policy.source, policy.arch))
    datasets = load_datasets(config, policy.source.hf_dir, policy.arch.vocab_size, trains=False)
    warn_long_sequences(datasets, min(model.arch.max_position_embeddings for model in models))
    pairs = datasets.train
    check_all_agree("data or model configuration", f"{datasets.digests} {[model.arch for model in models]}")
    group_size = config.train.global_batch_size
    # Rank 0 decides for all: file systems may show other ranks another moment.
    identity = on_main(lambda: _identity(config, models, pairs))
    begun = on_main(
        lambda: files.begin(identity, [model.role for model in models], pairs=len(pairs), group_size=group_size)
    )
    finished = begun is None
    if finished:
        logger.info("%s is finished, with the same model and data.", files.output)
    places = begun or {model.role: len(pairs) for model in models}
    builder = build_batches(config, policy.arch, state, datasets.pad_token_id)
    seconds = _score_rest(config, models, pairs, files, places, builder, state, device)
    if finished:
        on_main(lambda: _summarise_again(config, files, buckets, pairs))
    else:
        scored = {model.role: len(pairs) - places[model.role] for model in models}
        on_main(lambda: _finish(config, files, identity, models, datasets, buckets, scored, seconds))


def _models(config: Config) -> list[_Model]:
    """The scored model and, where one is named, the reference."""
    source = model_source(config.model)
    arch, alone = read_architecture(source.hf_dir), config.reference.hf_path is None
    models = [_Model(Role.policy, config.model.name, source, arch, kept=alone)]
    if config.reference.hf_path is not None:
        hf_dir = Path(config.reference.hf_path)
        own = ModelSource(hf_dir, checkpoint=None)
        models.append(_Model(Role.reference, directory_name(hf_dir), own, read_architecture(hf_dir), kept=True))
    return models


def _score_rest(
    config: Config,
    models: Sequence[_Model],
    pairs: PairView,
    files: ScoreFiles,
    places: Mapping[Role, int],
    builder: BatchBuilder,
    state: ParallelState,
    device: Device,
) -> float:
    """Has each model score the pairs from its place on, one model after the other; seconds without loading."""
    seconds = 0.0
    with ExitStack() as stack:
        stores: list[LogProbStore] = []  # one, on rank 0, where log-probs are kept for trainings
        if config.reference.cache_dir is not None:
            opening = partial(open_reference_store, config, models[0].source)
            on_main(lambda: stores.append(stack.enter_context(opening())), patience_s=PATIENCE_S)
        for model in models:
            done = places[model.role]
            if 0 < done < len(pairs):
                logger.info("%s: going on after %d of %d pairs", _TITLES[model.role], done, len(pairs))
            if done < len(pairs):
                batches = evaluation_batches(
                    pairs, group_size=config.train.global_batch_size, builder=builder, first=done
                )
                seconds += _score_pass(config, model, batches, pairs, files, stores, done, state, device)
                gc.collect()  # modules refer to each other, and the next model is about to need the room
        on_main(lambda: _tell_kept(stores, pairs))
    return seconds


def _score_pass(
    config: Config,
    model: _Model,
    batches: Iterator[GlobalBatch],
    pairs: PairView,
    files: ScoreFiles,
    stores: Sequence[LogProbStore],
    done: int,
    state: ParallelState,
    device: Device,
) -> float:
    """Loads a model, has it score the batches, the first of which begins with pair `done`; seconds without loading.

    Rank 0 writes a line for each pair and, for the reference of a training, a record in the store. The model is gone
    afterwards.
    """
    chunks = load_starting_model(config, model.source, model.arch, state, device)
    first, started = done, time.perf_counter()
    with ExitStack() as stack:
        sinks: list[_Sink] = []  # one, on rank 0

        def open_sink() -> None:
            writer = stack.enter_context(ScoreWriter(files.scores(model.role)))
            sinks.append(_Sink(model.role, pairs, writer, stores if model.kept else ()))

        on_main(open_sink)
        judge = Judge(config, model_source(config.model))
        title = _TITLES[model.role]
        bar = stack.enter_context(ProgressBar(title, total=len(pairs), done=done, visible=state.is_main))
        for batch in stack.enter_context(prefetched(batches)):
            logps_G4 = score_batch(chunks, batch, state, device.torch_device)
            judge.hold("the data", partial(_write, sinks, done, batch, logps_G4))
            done += len(logps_G4)
            pace = (done - first) / (time.perf_counter() - started)
            bar.update(done, f"{done} of {len(pairs)} pairs, {pace:.1f} pairs/s")
    return time.perf_counter() - started


@dataclass(frozen=True, slots=True)
class _Sink:
    """Where the numbers of a pass go: a line a pair and, with a store, a record a pair."""

    role: Role
    pairs: PairView
    writer: ScoreWriter
    stores: Sequence[LogProbStore]

    def write(self, first: int, batch: GlobalBatch, logps_G4: LogProbs, limit: float) -> Disagreement | None:
        """Writes the log-probs of the batch's pairs, of which the first is the `first` of all.

        Instead it tells where they differ from what the store has by more than `limit`.
        """
        lines = [
            _line(self.role, self.pairs, place, index, chosen, rejected)
            for place, (index, (chosen, rejected, *_)) in enumerate(
                zip(batch.pair_indices, logps_G4.tolist(), strict=True), start=first
            )
        ]
        for store in self.stores:  # before the lines, which say what need not be scored again
            if found := keep(store, self.pairs[first : first + len(lines)], logps_G4, limit):
                return found
        self.writer.write(lines)
        return None


def _tell_kept(stores: Sequence[LogProbStore], pairs: PairView) -> None:
    for store in stores:
        known = int(store.known([pair.digest for pair in pairs]).sum())
        logger.info("%s has the log-probs of %d of %d pairs", store.directory, known, len(pairs))
        if known < len(pairs):
            logger.warning(
                "the others were scored before reference.cache_dir was given: a training computes them, or remove the "
                "scores and score again"
            )


def _write(
    sinks: Sequence[_Sink], first: int, batch: GlobalBatch, logps_G4: LogProbs, limit: float
) -> Disagreement | None:
    return next((found for sink in sinks if (found := sink.write(first, batch, logps_G4, limit))), None)


def _line(role: Role, pairs: PairView, place: int, index: int, chosen: float, rejected: float) -> dict[str, Any]:
    """What a pass writes of the pair at `place`, row `index` of the data."""
    if not (math.isfinite(chosen) and math.isfinite(rejected)):
        whose = "the reference" if role is Role.reference else "the model"
        raise MegaDPOError(
            f"pair {index} (a row of the data, from 0) has log-probs {chosen} and {rejected}: {whose} computes no "
            "finite numbers on it; look at that pair, and at the weights (precision.dtype=fp32 rules out overflow)"
        )
    if role is Role.reference:
        return {"index": index, "reference_chosen_logp": chosen, "reference_rejected_logp": rejected}
    return {
        "index": index,
        "chosen_logp": chosen,
        "rejected_logp": rejected,
        "chosen_tokens": int(pairs.chosen_lengths[place]),
        "rejected_tokens": int(pairs.rejected_lengths[place]),
    }


def _identity(config: Config, models: Sequence[_Model], pairs: PairView) -> dict[str, Any]:
    """What the numbers depend on, the layout left out: pairs, weights and their format, in plain values."""
    fp8 = fp8_settings(config)
    policy, *others = models
    return {
        "data": pairs.digest,
        "rows": hashlib.sha256(pairs.rows_n.tobytes()).hexdigest(),
        "template_date": str(config.data.template_date),
        **_weights(policy.source),
        **({"reference": {**_weights(others[0].source), "beta": config.loss.beta}} if others else {}),
        "dtype": str(config.precision.dtype),
        # A scale belongs to what is packed together, and to a tensor rank's part.
        **({} if fp8 is None else {"fp8": f"{fp8}, {config.parallel}, {config.data.tokens_per_microbatch} tokens"}),
    }


def _weights(source: ModelSource) -> dict[str, Any]:
    """Directory, and size and age of the files, that a model is read from."""
    return {
        "model": str((source.checkpoint or source.hf_dir).resolve()),
        "weights": {
            path.name: f"{path.stat().st_size} bytes, modified {path.stat().st_mtime_ns}"
            for path in (*weight_files(source), source.hf_dir / "config.json")
        },
    }


def _finish(
    config: Config,
    files: ScoreFiles,
    identity: dict[str, Any],
    models: Sequence[_Model],
    datasets: Datasets,
    buckets: Buckets,
    scored: Mapping[Role, int],
    seconds: float,
) -> None:
    """Writes the summary, gives the scores their name, and prints the summary as tables; on one rank."""
    pairs, lines = datasets.train, files.scores(Role.policy)
    if Role.reference in scored:
        lines = files.join(partial(with_reference, beta=config.loss.beta))
    scores = read_scores(files.read(lines))
    run = {
        **{("model" if model.role is Role.policy else "reference"): model.name for model in models},
        "pairs": pairs.counts.kept,
        "dropped": pairs.counts.read - pairs.counts.kept,
        "tokens": int(pairs.stream_lengths(share_prompt=False).sum()),
        "scored_tokens": int(scores.response_tokens_n.sum()),
        "pairs_scored_in_this_run": scored[Role.policy],
        **({"reference_pairs_scored_in_this_run": scored[Role.reference]} if Role.reference in scored else {}),
        "seconds": seconds,
        "pairs_per_s": sum(scored.values()) / seconds if seconds else 0.0,
    }
    summary = {**run, **summarise(scores, _stream_tokens(config, pairs), buckets, config.loss.beta)}
    files.finish({**summary, "identity": identity}, lines)
    _show(files, summary)
    logger.info("wrote %s and %s", files.output, files.summary)


def _summarise_again(config: Config, files: ScoreFiles, buckets: Buckets, pairs: PairView) -> None:
    """Parts a finished scoring's pairs by `buckets`, and writes its summary anew where that changes it; on one rank."""
    known = files.read_summary()
    scores = read_scores(files.read(files.output))
    summary = {**known, **summarise(scores, _stream_tokens(config, pairs), buckets, config.loss.beta)}
    if summary != known:
        files.write_summary(summary)
        logger.info("wrote %s", files.summary)
    _show(files, summary)


def _stream_tokens(config: Config, pairs: PairView) -> npt.NDArray[np.int64]:
    return pairs.stream_lengths(share_prompt=config.data.share_prompt)


def _show(files: ScoreFiles, summary: Mapping[str, Any]) -> None:
    table = Table("scores", str(files.output))
    for name, value in summary.items():
        if not isinstance(value, Mapping):
            table.add_row(name.replace("_", " "), f"{value:.6g}" if isinstance(value, float) else str(value))
    console = Console()
    console.print(table)
    console.print(bucket_table(summary))
