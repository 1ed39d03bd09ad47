"""Log-probs of every retained pair under one model, at any layout: one JSON object a pair, in the order of the data.

Until it is complete, OUT.jsonl grows as OUT.jsonl.partial/scores.jsonl, beside an identity of model and data: a scoring
that was killed goes on where it stopped, and never under another model. Legend: G pairs of a group.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megadpo.assembly import build_batches, check_weight_files, load_starting_model
from megadpo.compute import announce, fp8_settings
from megadpo.config.compose import resolve_defaults
from megadpo.config.schema import Config
from megadpo.data.loader import GlobalBatch, evaluation_batches
from megadpo.data.prefetch import prefetched
from megadpo.data.store import PairView
from megadpo.datasets import Datasets, load_datasets, warn_long_sequences
from megadpo.device import Device
from megadpo.errors import MegaDPOError
from megadpo.forward_step import score
from megadpo.model_source import ModelSource, model_source, resolve_checkpoint
from megadpo.models.hf_config import read_architecture
from megadpo.parallel.collectives import check_all_agree, gather_rows, on_main
from megadpo.parallel.state import ParallelState
from megadpo.progress import ProgressBar
from megadpo.rank_logging import get_logger
from megadpo.score_files import ScoreFiles, ScoreWriter
from megadpo.session import open_session

logger = get_logger(__name__)


def run_scoring(config: Config, output: Path) -> None:
    """Writes `output` and its summary on rank 0; collective over all ranks of the launch. `config` has been validated.

    A finished `output` of the same model and data is left as it is; another one is a MegaDPOError on every rank.
    """
    files = ScoreFiles(output)
    with open_session(config, partial(_begin, files)) as session:
        _score_all(session.config, files, session.state, session.device)


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
    return resolve_checkpoint(resolve_defaults(replace(config, data=data), datetime.now()))


def _score_all(config: Config, files: ScoreFiles, state: ParallelState, device: Device) -> None:
    source = model_source(config.model)
    arch = read_architecture(source.hf_dir)
    announce(config, arch, device, trains=False)
    on_main(lambda: check_weight_files(config, source, arch))
    datasets = load_datasets(config, source.hf_dir, arch.vocab_size)
    warn_long_sequences(datasets, arch.max_position_embeddings)
    pairs = datasets.train
    check_all_agree("data or model configuration", f"{datasets.digests} {arch}")
    group_size = config.train.global_batch_size
    # Rank 0 decides for all: file systems may show other ranks another moment.
    identity = on_main(lambda: _identity(config, source, pairs))
    done = on_main(lambda: files.begin(identity, group_size))
    if done is None:
        logger.info("%s is finished, with the same model and data. Nothing to do.", files.output)
        return
    if done:
        logger.info("going on after %d of %d pairs", done, len(pairs))
    started = time.perf_counter()
    if done < len(pairs):
        chunks = load_starting_model(config, source, arch, state, device)
        builder = build_batches(config, arch, state, datasets.pad_token_id)
        started = time.perf_counter()
        batches = evaluation_batches(pairs, group_size=group_size, builder=builder, first=done)
        _score_groups(chunks, batches, pairs, files, done, state, device)
    seconds = time.perf_counter() - started
    on_main(lambda: _finish(files, identity, datasets, len(pairs) - done, seconds))


def _score_groups(
    chunks: Sequence[torch.nn.Module],
    batches: Iterator[GlobalBatch],
    pairs: PairView,
    files: ScoreFiles,
    done: int,
    state: ParallelState,
    device: Device,
) -> None:
    """Scores the batches, the first of which begins with pair `done`, and has rank 0 write a line for each pair."""
    with ExitStack() as stack:
        writers: list[ScoreWriter] = []  # one, on rank 0
        on_main(lambda: writers.append(stack.enter_context(ScoreWriter(files.scores))))
        bar = stack.enter_context(ProgressBar("scoring", total=len(pairs), done=done, visible=state.is_main))
        first, started = done, time.perf_counter()
        for batch in stack.enter_context(prefetched(batches)):
            logps = score_batch(chunks, batch, state, device)
            lines = [
                _line(index, *both, int(pairs.chosen_lengths[place]), int(pairs.rejected_lengths[place]))
                for place, (index, both) in enumerate(zip(batch.pair_indices, logps, strict=True), start=done)
            ]
            on_main(partial(_write, writers, lines))
            done += len(lines)
            pace = (done - first) / (time.perf_counter() - started)
            bar.tell(done, f"{done} of {len(pairs)} pairs, {pace:.1f} pairs/s")


def _write(writers: Sequence[ScoreWriter], lines: Sequence[dict[str, Any]]) -> None:
    for writer in writers:
        writer.write(lines)


def score_batch(
    chunks: Sequence[torch.nn.Module], batch: GlobalBatch, state: ParallelState, device: Device
) -> list[tuple[float, float]]:
    """(chosen, rejected) log-probs of the global batch's pairs, in order, on every rank. One all-gather of [2·G]."""
    place = {index: i for i, index in enumerate(batch.pair_indices)}
    logps_G2 = torch.zeros(len(place), 2, dtype=torch.float64, device=device.torch_device)
    scores = score(chunks, batch, device=device.torch_device)
    if state.is_last_stage and state.tensor_rank == 0:  # tensor-parallel peers hold the same: one of them speaks
        for microbatch, logps in zip(batch.microbatches, scores, strict=True):
            places = [place[index] for index in microbatch.pair_indices]
            logps_G2[places] = torch.stack((logps.chosen_B, logps.rejected_B), dim=1)
    # Every pair is on one rank, so the sum only collects: other ranks add zeros.
    rows: list[list[float]] = gather_rows(logps_G2.flatten()).sum(dim=0).view(-1, 2).tolist()
    return [(chosen, rejected) for chosen, rejected in rows]


def _line(index: int, chosen: float, rejected: float, chosen_tokens: int, rejected_tokens: int) -> dict[str, Any]:
    if not (math.isfinite(chosen) and math.isfinite(rejected)):
        raise MegaDPOError(
            f"pair {index} (a row of the data, from 0) has log-probs {chosen} and {rejected}: the model computes no "
            "finite numbers on it; look at that pair, and at the weights (precision.dtype=fp32 rules out overflow)"
        )
    return {
        "index": index,
        "chosen_logp": chosen,
        "rejected_logp": rejected,
        "chosen_tokens": chosen_tokens,
        "rejected_tokens": rejected_tokens,
    }


def _identity(config: Config, source: ModelSource, pairs: PairView) -> dict[str, Any]:
    """What the numbers depend on, the layout left out: pairs, weights and their format, in plain values."""
    directory = (source.checkpoint or source.hf_dir).resolve()
    fp8 = fp8_settings(config)
    patterns = ("*.distcp", ".metadata") if source.checkpoint is not None else ("*.safetensors",)
    weights = sorted(path for pattern in patterns for path in directory.glob(pattern))
    return {
        "data": pairs.digest,
        "rows": hashlib.sha256(pairs.rows_n.tobytes()).hexdigest(),
        "template_date": str(config.data.template_date),
        "model": str(directory),
        "weights": {
            path.name: f"{path.stat().st_size} bytes, modified {path.stat().st_mtime_ns}"
            for path in (*weights, source.hf_dir / "config.json")
        },
        "dtype": str(config.precision.dtype),
        # A scale belongs to what is packed together, and to a tensor rank's part.
        **({} if fp8 is None else {"fp8": f"{fp8}, {config.parallel}, {config.data.tokens_per_microbatch} tokens"}),
    }


def _finish(files: ScoreFiles, identity: dict[str, Any], datasets: Datasets, scored: int, seconds: float) -> None:
    """Writes the summary, gives the scores their name, and prints the summary as a table; on one rank."""
    counts = datasets.train.counts
    chosen = rejected = 0.0
    higher = scored_tokens = 0
    for line in files.read_scores():
        chosen += line["chosen_logp"]
        rejected += line["rejected_logp"]
        higher += line["chosen_logp"] > line["rejected_logp"]
        scored_tokens += line["chosen_tokens"] + line["rejected_tokens"]
    summary = {
        "pairs": counts.kept,
        "dropped": counts.read - counts.kept,
        "mean_chosen_logp": chosen / counts.kept,
        "mean_rejected_logp": rejected / counts.kept,
        "share_chosen_higher": higher / counts.kept,
        "tokens": int(datasets.train.stream_lengths(share_prompt=False).sum()),
        "scored_tokens": scored_tokens,
        "pairs_scored_in_this_run": scored,
        "seconds": seconds,
        "pairs_per_s": scored / seconds,
    }
    files.finish({**summary, "identity": identity})
    table = Table("scores", str(files.output))
    for name, value in summary.items():
        table.add_row(name.replace("_", " "), f"{value:.6g}" if isinstance(value, float) else str(value))
    Console().print(table)
    logger.info("wrote %s and %s", files.output, files.summary)
