"""The pairs of a run: sources of the configuration, tokenized once by rank 0 and mapped into memory by every rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from megadpo.config.choices import OnError
from megadpo.config.reference_rules import LIVE
from megadpo.config.schema import Config, DataConfig
from megadpo.data.dataset import validation_rows
from megadpo.data.layouts import Keys
from megadpo.data.loader import BatchBuilder, BatchShape, Cursor, TrainingData
from megadpo.data.prepare import PreparedStore, Recipe, available_cpus, open_store, prepare_store
from megadpo.data.store import PairCounts, PairView, PreparationReport, described_counts, select_pairs
from megadpo.data.tokenization import describe_pair, load_tokenizer
from megadpo.models.fp8_recipes import token_multiple
from megadpo.runtime.collectives import check_all_agree, on_main
from megadpo.runtime.parallel_state import ParallelState
from megadpo.runtime.progress import ProgressBar
from megadpo.runtime.rank_logging import get_logger, global_rank
from megadpo.setup.session import Session

logger = get_logger(__name__)

# Rank 0 may tokenize for hours while the others have nothing to do; should it die, the launcher ends them.
_PATIENCE_S = 7 * 86_400.0
_TRAIN, _VALIDATION = "training", "validation"
_PROBLEMS_SHOWN = 10


@dataclass(frozen=True, slots=True)
class PreparedStores:
    """The token stores of a run's sets by name (`training`, `validation NAME`), and the pad token."""

    stores: Mapping[str, PreparedStore]
    pad_token_id: int


@dataclass(frozen=True, slots=True)
class Datasets:
    """Retained pairs for training and for each validation set, and the pad token."""

    train: PairView
    validation: dict[str, PairView]
    pad_token_id: int
    skipped_rows: tuple[str, ...]
    """the first rows that were skipped, with the reasons"""

    @property
    def views(self) -> dict[str, PairView]:
        """Every set, under `train` and `eval/NAME`."""
        return {"train": self.train, **{f"eval/{name}".rstrip("/"): view for name, view in self.validation.items()}}

    @property
    def digests(self) -> dict[str, str]:
        """Hash of each set's token ids."""
        return {name: view.digest for name, view in self.views.items()}

    def report(self) -> dict[str, Any]:
        """Counts of the rows of each set, kept and dropped, in plain values."""
        return {
            "sets": {
                name: {
                    **asdict(view.counts),
                    "tokens": int(view.stream_lengths(share_prompt=False).sum()),
                    "longest_sequence": view.longest_sequence,
                    "digest": view.digest,
                }
                for name, view in self.views.items()
            },
            "skipped_rows": list(self.skipped_rows),
        }


def load_datasets(session: Session, *, trains: bool = True) -> Datasets:
    """Every set of a run on every rank; rank 0 reads and tokenizes what is not in data.cache_dir yet.

    Collective over all ranks, which wait for rank 0 without a time limit, and then agree that they see the same pairs.
    Unless it `trains`, messages don't call the pairs training pairs. Raises DataError or ConfigError, the same on every
    rank.
    """
    config, tokenizer_dir, arch = session.config, session.source.hf_dir, session.arch
    prepared = on_main(lambda: prepare_stores(config, tokenizer_dir, trains=trains), patience_s=_PATIENCE_S)
    datasets = open_datasets(config, prepared, tokenizer_dir, arch.vocab_size, trains=trains)
    models = (arch, session.reference_arch)
    _warn_long_sequences(datasets, min(model.max_position_embeddings for model in models))
    check_all_agree("data or model configuration", f"{datasets.digests} {models}")
    return datasets


def prepare_stores(config: Config, tokenizer_dir: Path, *, trains: bool = True) -> PreparedStores:
    """Tokenizes every set that data.cache_dir does not hold yet; for one process, no collectives."""
    data = config.data
    tokenizer = load_tokenizer(tokenizer_dir)
    recipe = Recipe(
        keys=Keys(data.prompt_key, data.chosen_key, data.rejected_key),
        tokenizer_dir=tokenizer_dir,
        template_date=date.fromisoformat(str(data.template_date)),
        skip_bad_rows=data.on_error == OnError.skip,
    )
    stores = {}
    for name, specs in _sources(config).items():
        with ProgressBar(f"tokenizing {_title(name, trains)}", total=100, visible=True) as bar:

            def report(share: float, pairs: int, bar: ProgressBar = bar) -> None:
                bar.update(round(100 * share), f"{pairs} pairs, {share:.0%} of the data read")

            stores[name] = prepare_store(
                specs,
                recipe,
                cache_dir=Path(str(data.cache_dir)),
                workers=data.workers or available_cpus(),
                report=report,
            )
    return PreparedStores(stores, int(tokenizer.pad_token_id))


def open_datasets(
    config: Config, prepared: PreparedStores, tokenizer_dir: Path, vocab_size: int, *, trains: bool = True
) -> Datasets:
    """The retained pairs of prepared stores, with the counts of the others logged; any rank, no collectives.

    Raises DataError where a set has no pair left, or token ids that a vocabulary of `vocab_size` does not have.
    """
    data = config.data
    stores = {name: open_store(store) for name, store in prepared.stores.items()}
    selections = {name: (store, np.arange(len(store))) for name, store in stores.items()}
    if data.validation_fraction > 0:
        store, rows = selections[_TRAIN]
        held_out = validation_rows(len(rows), data.validation_fraction, config.train.seed)
        selections[_TRAIN] = (store, np.setdiff1d(rows, held_out))
        selections[_VALIDATION] = (store, held_out)
    views = {
        name: select_pairs(
            store, rows, max_length=data.max_length, truncation=str(data.truncation), title=_title(name, trains)
        )
        for name, (store, rows) in selections.items()
    }
    for name, view in views.items():
        view.check_vocabulary(vocab_size)
        _log_counts(view.counts, _title(name, trains), data.max_length)
        _warn_oversized(view, _title(name, trains), data)
    for store in stores.values():
        _log_findings(store.report)
    train = views.pop(_TRAIN)
    if global_rank() == 0:
        logger.info(
            "the first %s as the model sees it:\n%s",
            _title(_TRAIN, trains).removesuffix("s"),
            describe_pair(train[0], load_tokenizer(tokenizer_dir)),
        )
    return Datasets(
        train=train,
        validation={name.removeprefix(_VALIDATION).strip(): view for name, view in views.items()},
        pad_token_id=_pad_token_id(prepared.pad_token_id, vocab_size),
        skipped_rows=tuple(problem for store in stores.values() for problem in store.report.problems),
    )


def build_training_data(session: Session, datasets: Datasets, start: Cursor) -> TrainingData:
    """The global batches of the training pairs, in their order from `start` on."""
    train = session.config.train
    return TrainingData(
        datasets.train,
        global_batch_size=train.global_batch_size,
        seed=train.seed,
        shuffle=train.shuffle,
        builder=build_batches(session, datasets.pad_token_id),
        start=start,
    )


def build_batches(session: Session, pad_token_id: int) -> BatchBuilder:
    """The builder of this rank's microbatches."""
    config = session.config
    return BatchBuilder(
        shape=batch_shape(
            session.state, sequence_parallel=bool(config.parallel.sequence_parallel), fp8_recipe=config.precision.fp8
        ),
        tokens_per_microbatch=config.data.tokens_per_microbatch,
        pad_token_id=pad_token_id,
        share_prompt=config.data.share_prompt,
        flop_rates=session.arch.flop_rates,
        reference_flop_rates=session.reference_arch.flop_rates if config.reference.mode in LIVE else None,
    )


def batch_shape(state: ParallelState, *, sequence_parallel: bool, fp8_recipe: str | None = None) -> BatchShape:
    """The shape of a batch that the layout and an FP8 recipe require."""
    return BatchShape(
        data_rank=state.data_rank,
        data_size=state.data_size,
        token_multiple=token_multiple(
            fp8_recipe, tensor=state.tensor_size, context=1, sequence_parallel=sequence_parallel
        ),
        fixed_streams=state.pipeline_size > 1,
        microbatch_multiple=state.pipeline_size if state.virtual_pipeline_size > 1 else 1,
    )


def _sources(config: Config) -> dict[str, list[str]]:
    """The sources of each set, by the name that it has in messages."""
    validation = {f"{_VALIDATION} {name}".strip(): [path] for name, path in config.data.validation_files().items()}
    return {_TRAIN: list(config.data.train_path), **validation}


def _title(name: str, trains: bool) -> str:
    """The name of a set's pairs in messages."""
    return f"{name} pairs" if trains or name != _TRAIN else "pairs"


def _pad_token_id(wanted: int, vocab_size: int) -> int:
    """The tokenizer's pad token if the model's vocabulary has it, else token 0: nothing attends to padding."""
    if wanted < vocab_size:
        return wanted
    logger.warning(
        "the tokenizer's pad token has id %d, the model's vocabulary has %d entries: token 0 pads instead; the "
        "exported tokenizer keeps its own",
        wanted,
        vocab_size,
    )
    return 0


def _log_counts(counts: PairCounts, title: str, max_length: int) -> None:
    logger.info("%s: %d read, %d kept at max_length %d", title, counts.read, counts.kept, max_length)
    for what, number in described_counts(counts, max_length):
        logger.warning("%s: %s: %d of %d", title, what, number, counts.read)


def _log_findings(report: PreparationReport) -> None:
    for problem in report.problems[:_PROBLEMS_SHOWN]:
        logger.warning("skipped: %s", problem)
    if report.moved_boundary:
        logger.warning(
            "the tokenized prompt is not a prefix of the tokenized prompt with its responses (tokens merge across the "
            "boundary, or the chat template renders the prompt alone differently): the responses start where they "
            "part; the first such pair: %s",
            report.moved_boundary,
        )


def _warn_oversized(view: PairView, title: str, data: DataConfig) -> None:
    budget = data.tokens_per_microbatch
    oversized = int((view.stream_lengths(share_prompt=data.share_prompt) > budget).sum())
    if oversized:
        logger.warning(
            "%d of %d %s are longer than data.tokens_per_microbatch=%d; each gets a microbatch of its own, which "
            "takes more memory than the budget says, and under a pipeline a step's other microbatches are padded to it",
            oversized,
            len(view),
            title,
            budget,
        )


def _warn_long_sequences(datasets: Datasets, max_positions: int) -> None:
    longest = max(view.longest_sequence for view in datasets.views.values())
    if longest > max_positions:
        logger.warning(
            "the longest sequence has %d tokens, the model was made for %d: lower data.max_length",
            longest,
            max_positions,
        )
