"""Tokenizes sources into a store of pairs: in worker processes, in bounded memory, once for the same content."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

import numpy as np

from megadpo.data.dataset import RawRow, iter_rows, parse_row, text_size
from megadpo.data.layouts import Keys
from megadpo.data.sources import Source, open_source
from megadpo.data.store import (
    BAD,
    BOUNDARY_MERGED,
    DOUBLE_BOS,
    EQUAL,
    ROW,
    PairStore,
    PreparationReport,
    StoreWriter,
)
from megadpo.data.tokenization import TokenIds, Tokenization, Tokenizer, load_tokenizer, tokenize_pair
from megadpo.errors import DataError, MegaDPOError
from megadpo.runtime.cpus import usable_cpus
from megadpo.runtime.rank_logging import get_logger

logger = get_logger(__name__)

# Part of a store's name; to be raised when the same rows give other token ids or records than before.
_FORMAT = 1
_CHUNK_ROWS = 128
_CHUNK_BYTES = 4 * 2**20
# Starting worker processes takes seconds, so fewer chunks than these are tokenized without them.
_CHUNKS_BEFORE_WORKERS = 16
_MOST_WORKERS = 32
# Number of skipped rows whose problems are kept; all are counted.
_PROBLEMS_KEPT = 100
_SECONDS_BEFORE_LEFTOVERS_GO = 86_400.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that token ids depend on besides the sources: columns, tokenizer, and the date that templates get."""

    keys: Keys
    tokenizer_dir: Path
    template_date: date
    skip_bad_rows: bool


@dataclass(frozen=True, slots=True)
class PreparedStore:
    """The directory of a token store, and for each source the text before a line number in messages."""

    directory: Path
    locations: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Consecutive rows as records and token ids, ready for the store."""

    rows: np.ndarray
    tokens: np.ndarray
    progress: float
    """share of the sources that is read"""
    problems: list[str]
    moved_boundary: str
    """the first pair whose responses start before the end of its prompt, in words"""


def prepare_store(
    specs: Sequence[str],
    recipe: Recipe,
    *,
    cache_dir: Path,
    workers: int,
    report: Callable[[float, int], None],
) -> PreparedStore:
    """Finds the sources' token store under `cache_dir` by their content, or creates it.

    `report` is called with the share of the sources that is read and the number of rows done. With `workers` > 1,
    large sets are tokenized in that many processes. Only a few chunks of rows are in memory at a time. Raises DataError
    at the first row that can't be used, unless the recipe skips such rows. To be called by one process of the run.
    """
    sources = [open_source(spec) for spec in specs]
    locations = tuple(source.location for source in sources)
    directory = cache_dir / _content_key(sources, recipe)
    if directory.is_dir():
        logger.info("tokenized pairs found in %s", directory)
        return PreparedStore(directory, locations)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(cache_dir)
        _tokenizer.cache_clear()  # the tokenizer's files may have changed since this process last used them
        with StoreWriter(directory) as writer:
            _fill(writer, specs, recipe, workers, report)
    except OSError as error:
        raise DataError(
            f"data.cache_dir={cache_dir}: can't be written ({error.strerror or error}): make room, or choose another "
            "directory"
        ) from error
    return PreparedStore(directory, locations)


def open_store(prepared: PreparedStore) -> PairStore:
    """Opens the store that `prepare_store` found or created; for any process that sees its directory."""
    return PairStore(prepared.directory, prepared.locations)


def available_cpus() -> int:
    """Number of CPUs that this process may use, at most the number of workers that one reading process can feed."""
    return min(usable_cpus(), _MOST_WORKERS)


def _fill(
    writer: StoreWriter, specs: Sequence[str], recipe: Recipe, workers: int, report: Callable[[float, int], None]
) -> None:
    started = time.monotonic()
    chunks = _chunks(iter_rows(specs, recipe.keys))
    head = list(islice(chunks, _CHUNKS_BEFORE_WORKERS))
    if len(head) < _CHUNKS_BEFORE_WORKERS:
        workers = 1
    done, moved_boundary = 0, ""
    problems: list[str] = []
    with closing(_tokenized(chain(head, chunks), recipe, workers)) as results:
        for chunk in results:
            writer.append(chunk.rows, chunk.tokens)
            done += len(chunk.rows)
            problems += chunk.problems[: _PROBLEMS_KEPT - len(problems)]
            moved_boundary = moved_boundary or chunk.moved_boundary
            report(chunk.progress, done)
    writer.finish(PreparationReport(problems, moved_boundary))
    seconds = time.monotonic() - started
    logger.info(
        "tokenized %d pairs in %.1f s: %.0f pairs/s in %d process%s",
        done,
        seconds,
        done / seconds,
        workers,
        "es" if workers > 1 else "",
    )


def _chunks(rows: Iterator[RawRow]) -> Iterator[list[RawRow] | MegaDPOError]:
    """Groups consecutive rows; an error of the reader is raised after the rows before it, which may have their own."""
    chunk: list[RawRow] = []
    size = 0
    try:
        for row in rows:
            chunk.append(row)
            size += text_size(row.value)
            if len(chunk) == _CHUNK_ROWS or size >= _CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
    except MegaDPOError as error:
        if chunk:
            yield chunk
        yield error
        return
    if chunk:
        yield chunk


def _tokenized(
    chunks: Iterator[list[RawRow] | MegaDPOError], recipe: Recipe, workers: int
) -> Generator[_Chunk, None, None]:
    """Applies `_tokenize_rows` to each chunk; yields the results in order, with a few chunks per worker in flight."""
    if workers == 1:
        yield from (_tokenize_rows(chunk, recipe) for chunk in chunks)
        return
    # Spawned processes: this one may have threads of communication libraries, which do not survive a fork.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_end_with_parent)
    waiting: deque[Future[_Chunk]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_tokenize_rows, chunk, recipe))
            if len(waiting) >= 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except (BrokenProcessPool, OSError) as error:
        raise MegaDPOError(
            f"a worker process that tokenizes was killed or could not start ({error}; out of memory? a script of your "
            f"own without `if __name__ == '__main__':`?); lower data.workers={workers}: with 1 there are none"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Has this worker process end when its parent is gone, which a killed parent can't announce."""

    def wait() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=wait, daemon=True).start()


def _tokenize_rows(rows: list[RawRow] | MegaDPOError, recipe: Recipe) -> _Chunk:
    """Tokenizes some rows to records and token ids; raises the error if there is one in their place."""
    if isinstance(rows, MegaDPOError):
        raise rows
    tokenizer = _tokenizer(recipe.tokenizer_dir)
    records = np.zeros(len(rows), ROW)
    tokens: list[TokenIds] = []
    problems: list[str] = []
    moved_boundary, start = "", 0
    for record, row in zip(records, rows, strict=True):
        record["start"], record["file"], record["line"] = start, row.file, row.line
        try:
            result = tokenize_pair(parse_row(row, recipe.keys), tokenizer, template_date=recipe.template_date)
        except DataError as error:
            if not recipe.skip_bad_rows:
                raise DataError(f"{error}; data.on_error=skip leaves such rows out and counts them") from None
            record["flags"] = BAD
            problems.append(str(error))
            continue
        _fill_record(result, record)
        pair = result.pair
        tokens += [pair.prompt, pair.chosen, pair.rejected]
        start += len(pair.prompt) + len(pair.chosen) + len(pair.rejected)
        if len(result.left_out) and not moved_boundary:
            moved_boundary = f"{pair.where}: before {tokenizer.decode(result.left_out.tolist())!r}"
    flat = np.concatenate(tokens) if tokens else np.empty(0, np.int32)
    return _Chunk(records, flat, rows[-1].progress, problems, moved_boundary)


def _fill_record(result: Tokenization, record: np.void) -> None:
    """Fills a pair's record with its lengths, flags and hash."""
    pair = result.pair
    parts = (pair.prompt, pair.chosen, pair.rejected)
    record["prompt"], record["chosen"], record["rejected"] = map(len, parts)
    record["largest"] = max(int(ids.max(initial=-1)) for ids in parts)
    record["flags"] = (
        BOUNDARY_MERGED * (len(result.left_out) > 0)
        | DOUBLE_BOS * result.double_bos
        | EQUAL * np.array_equal(pair.chosen, pair.rejected)
    )
    record["digest"] = pair.digest


@cache
def _tokenizer(directory: Path) -> Tokenizer:
    """Returns the tokenizer, which is loaded once per process."""
    return load_tokenizer(directory)


def _content_key(sources: Sequence[Source], recipe: Recipe) -> str:
    """The name of a store: a hash of everything that its token ids depend on."""
    files = tokenizer_files(recipe.tokenizer_dir)
    asks_for_date = any(b"strftime_now" in content for content in files.values())
    parts = {
        "format": _FORMAT,
        "sources": [source.digest() for source in sources],
        "keys": asdict(recipe.keys),
        "skip_bad_rows": recipe.skip_bad_rows,
        "tokenizer": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        "template_date": str(recipe.template_date) if asks_for_date else None,
        "libraries": {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers")},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def tokenizer_files(directory: Path) -> dict[str, bytes]:
    """Contents of a tokenizer's files, by name."""
    patterns = "config.json tokenizer* special_tokens_map.json added_tokens.json vocab* merges.txt".split()
    patterns += ["chat_template*", "tekken.json", "additional_chat_templates/*", "*.model", "*.tiktoken"]
    paths = {path for pattern in patterns for path in directory.glob(pattern) if path.is_file()}
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(paths)}


def _remove_leftovers(cache_dir: Path) -> None:
    """Removes incomplete stores of killed runs; those younger than a day may still be growing."""
    for partial_store in cache_dir.glob(".*.partial"):
        with suppress(OSError):  # a run that shares the cache may finish or remove it at this moment
            newest = max(path.stat().st_mtime for path in (partial_store, *partial_store.iterdir()))
            if time.time() - newest > _SECONDS_BEFORE_LEFTOVERS_GO:
                shutil.rmtree(partial_store)
