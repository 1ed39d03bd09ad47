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
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megadpo.commands.score_files import Role, ScoreFiles, ScoreWriter
from megadpo.commands.score_summary import Buckets, Scores, bucket_table, read_scores, summarise, with_reference
from megadpo.config.compose import resolve_defaults
from megadpo.config.schema import Config
from megadpo.data.loader import BatchBuilder, GlobalBatch, evaluation_batches
from megadpo.data.prefetch import prefetched
from megadpo.data.store import PairView
from megadpo.errors import MegaDPOError
from megadpo.forward_step import score_batch
from megadpo.reference.agreement import Disagreement
from megadpo.reference.store import LogProbs, LogProbStore
from megadpo.runtime.collectives import on_main
from megadpo.runtime.progress import ProgressBar
from megadpo.runtime.rank_logging import get_logger
from megadpo.setup.datasets import build_batches, load_datasets
from megadpo.setup.model_source import ModelSource, directory_name, resolve_model
from megadpo.setup.models import check_weight_files, load_reference_model, load_starting_model, weight_files
from megadpo.setup.options import check_and_log_options, fp8_settings
from megadpo.setup.reference_cache import PATIENCE_S, AgreementCheck, keep, open_reference_store
from megadpo.setup.session import Session, open_session

logger = get_logger(__name__)

_TITLES = {Role.policy: "scoring", Role.reference: "scoring with the reference"}


def run_scoring(config: Config, output: Path, buckets: Buckets | None = None) -> None:
    """Writes `output` and its summary on rank 0; collective over all ranks of the launch. `config` has been validated.

    With `reference.hf_path` that model scores the pairs too. A finished `output` of the same models and data is left as
    it is, and its summary is split anew where `buckets` are others; another one is a MegaDPOError on every rank.
    """
    files = ScoreFiles(output)
    with open_session(config, partial(_begin, files)) as session:
        check_and_log_options(session, trains=False)
        on_main(lambda: check_weight_files(session))
        datasets = load_datasets(session, trains=False)
        scoring = _Scoring(session, files, datasets.train, build_batches(session, datasets.pad_token_id))
        scoring.run(buckets or Buckets())


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


@dataclass(frozen=True, slots=True)
class _Scoring:
    """The scoring of a data set's pairs by the model, and by the reference where one is named.

    The methods are collective over all ranks, unless they say that they are for one rank.
    """

    session: Session
    files: ScoreFiles
    pairs: PairView
    builder: BatchBuilder

    @property
    def roles(self) -> list[Role]:
        """The models that score, in their order."""
        return [Role.policy] if self.session.config.reference.hf_path is None else [Role.policy, Role.reference]

    def run(self, buckets: Buckets) -> None:
        """Scores what is not scored yet, and writes the summary, split by `buckets`."""
        group_size = self.session.config.train.global_batch_size
        # Rank 0 decides for all: file systems may show other ranks another moment.
        identity = on_main(lambda: _identity(self.session, self.roles, self.pairs))
        begun = on_main(lambda: self.files.begin(identity, self.roles, pairs=len(self.pairs), group_size=group_size))
        if begun is None:
            logger.info("%s is finished, with the same model and data.", self.files.output)
        done = begun or dict.fromkeys(self.roles, len(self.pairs))
        seconds = self._score_rest(done)
        if begun is None:
            on_main(lambda: self._summarise_again(buckets))
        else:
            scored = {role: len(self.pairs) - done[role] for role in self.roles}
            on_main(lambda: self._finish(identity, buckets, scored, seconds))

    def _score_rest(self, done: Mapping[Role, int]) -> float:
        """Has each model score the pairs behind those that are `done`; returns the seconds without loading."""
        seconds = 0.0
        with ExitStack() as stack:
            stores: list[LogProbStore] = []  # one, on rank 0, where log-probs are kept for trainings
            if self.session.config.reference.cache_dir is not None:

                def open_store() -> None:
                    stores.append(stack.enter_context(open_reference_store(self.session)))

                on_main(open_store, patience_s=PATIENCE_S)
            for role in self.roles:
                if 0 < done[role] < len(self.pairs):
                    logger.info("%s: going on after %d of %d pairs", _TITLES[role], done[role], len(self.pairs))
                if done[role] < len(self.pairs):
                    seconds += self._score_pass(role, done[role], stores)
                    gc.collect()  # modules refer to each other, and the next model is about to need the room
            on_main(lambda: _log_kept(stores, self.pairs))
        return seconds

    def _score_pass(self, role: Role, first: int, stores: Sequence[LogProbStore]) -> float:
        """Loads a model and has it score the pairs from `first` on; returns the seconds without loading.

        Rank 0 writes a line for each pair and, for the model that a training has for reference, a record in the store.
        The model is freed afterwards.
        """
        session = self.session
        chunks = load_reference_model(session) if role is Role.reference else load_starting_model(session)
        group_size, is_reference = session.config.train.global_batch_size, role is self.roles[-1]
        batches = evaluation_batches(self.pairs, group_size=group_size, builder=self.builder, first=first)
        done, started = first, time.perf_counter()
        with ExitStack() as stack:
            sinks: list[_Sink] = []  # one, on rank 0

            def open_sink() -> None:
                writer = stack.enter_context(ScoreWriter(self.files.scores(role)))
                sinks.append(_Sink(role, self.pairs, writer, stores if is_reference else ()))

            on_main(open_sink)
            agreement = AgreementCheck(session)
            title, visible = _TITLES[role], session.state.is_main
            bar = stack.enter_context(ProgressBar(title, total=len(self.pairs), done=done, visible=visible))
            for batch in stack.enter_context(prefetched(batches)):
                logps_G4 = score_batch(chunks, batch, session.state, session.device.torch_device)
                agreement.check("the data", partial(_write, sinks, done, batch, logps_G4))
                done += len(logps_G4)
                pace = (done - first) / (time.perf_counter() - started)
                bar.update(done, f"{done} of {len(self.pairs)} pairs, {pace:.1f} pairs/s")
        return time.perf_counter() - started

    def _finish(
        self, identity: Mapping[str, Any], buckets: Buckets, scored: Mapping[Role, int], seconds: float
    ) -> None:
        """Writes the summary, gives the scores their name, and prints the summary as tables; on one rank."""
        config, pairs, lines = self.session.config, self.pairs, self.files.scores(Role.policy)
        if Role.reference in scored:
            lines = self.files.join(partial(with_reference, beta=config.loss.beta))
        scores = read_scores(self.files.read(lines))
        names = {"model": config.model.name}
        if Role.reference in scored:
            names["reference"] = directory_name(self.session.reference_source.hf_dir)
        run = {
            **names,
            "pairs": pairs.counts.kept,
            "dropped": pairs.counts.read - pairs.counts.kept,
            "tokens": int(pairs.stream_lengths(share_prompt=False).sum()),
            "scored_tokens": int(scores.response_tokens_n.sum()),
            "pairs_scored_in_this_run": scored[Role.policy],
            **({"reference_pairs_scored_in_this_run": scored[Role.reference]} if Role.reference in scored else {}),
            "seconds": seconds,
            "pairs_per_s": sum(scored.values()) / seconds if seconds else 0.0,
        }
        summary = {**run, **self._statistics(scores, buckets)}
        self.files.finish({**summary, "identity": identity}, lines)
        _show(self.files, summary)
        logger.info("wrote %s and %s", self.files.output, self.files.summary)

    def _summarise_again(self, buckets: Buckets) -> None:
        """Splits a finished scoring's pairs by `buckets`, and rewrites its summary if that changes it; on one rank."""
        known = self.files.read_summary()
        summary = {**known, **self._statistics(read_scores(self.files.read(self.files.output)), buckets)}
        if summary != known:
            self.files.write_summary(summary)
            logger.info("wrote %s", self.files.summary)
        _show(self.files, summary)

    def _statistics(self, scores: Scores, buckets: Buckets) -> dict[str, Any]:
        tokens_n = self.pairs.stream_lengths(share_prompt=self.session.config.data.share_prompt)
        return summarise(scores, tokens_n, buckets, self.session.config.loss.beta)


@dataclass(frozen=True, slots=True)
class _Sink:
    """The files of a pass: a line a pair and, with a store, a record a pair."""

    role: Role
    pairs: PairView
    writer: ScoreWriter
    stores: Sequence[LogProbStore]

    def write(self, first: int, batch: GlobalBatch, logps_G4: LogProbs, limit: float) -> Disagreement | None:
        """Writes the log-probs of the batch's pairs, of which the first is the `first` of all.

        Returns instead, without writing, how they differ from the store's where that is by more than `limit`.
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


def _log_kept(stores: Sequence[LogProbStore], pairs: PairView) -> None:
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
    """The line of the pair at `place` of the set, row `index` of the data."""
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


def _identity(session: Session, roles: Sequence[Role], pairs: PairView) -> dict[str, Any]:
    """Everything that the numbers depend on but the layout: pairs, weights and their format, in plain values."""
    config = session.config
    fp8 = fp8_settings(config)
    reference = {}
    if Role.reference in roles:
        reference["reference"] = {**_weights(session.reference_source), "beta": config.loss.beta}
    return {
        "data": pairs.digest,
        "rows": hashlib.sha256(pairs.rows_n.tobytes()).hexdigest(),
        "template_date": str(config.data.template_date),
        **_weights(session.source),
        **reference,
        "dtype": str(config.precision.dtype),
        # A scale belongs to what is packed together, and to a tensor rank's part.
        **({} if fp8 is None else {"fp8": f"{fp8}, {config.parallel}, {config.data.tokens_per_microbatch} tokens"}),
    }


def _weights(source: ModelSource) -> dict[str, Any]:
    """The directory that a model is read from, with the size and age of its files."""
    return {
        "model": str((source.checkpoint or source.hf_dir).resolve()),
        "weights": {
            path.name: f"{path.stat().st_size} bytes, modified {path.stat().st_mtime_ns}"
            for path in (*weight_files(source), source.hf_dir / "config.json")
        },
    }


def _show(files: ScoreFiles, summary: Mapping[str, Any]) -> None:
    table = Table("scores", str(files.output))
    for name, value in summary.items():
        if not isinstance(value, Mapping):
            table.add_row(name.replace("_", " "), f"{value:.6g}" if isinstance(value, float) else str(value))
    console = Console()
    console.print(table)
    console.print(bucket_table(summary))
