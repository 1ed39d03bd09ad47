"""Tokenized pairs on disk: written once, memory-mapped by every rank, truncated when they are accessed.

A store holds every row that was read, in order and untruncated, so that limits and splits can change without tokenizing
again. Its directory has `tokens.bin` (all token ids, int32), `rows.npy` (one record per row) and `store.json`.

Legend: n pairs of a view.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import overload
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from megadpo.data.batch import stream_tokens
from megadpo.data.tokenization import TokenizedPair
from megadpo.data.truncation import Cut, Lengths, Outcome, cut_to_length
from megadpo.errors import DataError

TOKEN = np.dtype("<i4")
ROW = np.dtype(
    [
        ("start", "<i8"),  # offset of the row's prompt · chosen · rejected among all token ids
        ("prompt", "<i4"),  # numbers of tokens
        ("chosen", "<i4"),
        ("rejected", "<i4"),
        ("largest", "<i4"),  # token id
        ("file", "<i4"),
        ("line", "<i8"),
        ("flags", "u1"),
        ("digest", "V16"),  # of the three lists of token ids
    ]
)
BAD, BOUNDARY_MERGED, DOUBLE_BOS, EQUAL = 1, 2, 4, 8

RowNumbers = npt.NDArray[np.int64]

_TOKENS, _ROWS, _REPORT = "tokens.bin", "rows.npy", "store.json"


@dataclass(frozen=True, slots=True)
class PreparationReport:
    """Findings of tokenizing, in words: the first rows that were skipped, and the first pair whose boundary moved."""

    problems: list[str]
    moved_boundary: str


class StoreWriter:
    """Writes a store chunk by chunk; a context manager. The store gets its name when `finish` is called."""

    def __init__(self, directory: Path) -> None:
        self._final = directory
        # Not the process id, which is the same in every container, and in one that restarts after a kill.
        self._partial = directory.with_name(f".{directory.name}.{uuid4().hex}.partial")
        self._partial.mkdir(parents=True)
        self._tokens = (self._partial / _TOKENS).open("wb")
        self._rows: list[np.ndarray] = []
        self._num_tokens = 0

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tokens.close()
        shutil.rmtree(self._partial, ignore_errors=True)  # removed already if the store is finished

    def append(self, rows: np.ndarray, tokens: npt.NDArray[np.int32]) -> None:
        """Appends records, whose `start` is relative to the beginning of `tokens`, and their token ids."""
        rows = rows.copy()
        rows["start"] += self._num_tokens
        self._rows.append(rows)
        self._tokens.write(tokens.astype(TOKEN, copy=False).tobytes())
        self._num_tokens += len(tokens)

    def finish(self, report: PreparationReport) -> None:
        """Flushes everything to disk and gives the store its name; another writer of it may have been faster."""
        self._tokens.close()
        np.save(self._partial / _ROWS, np.concatenate(self._rows) if self._rows else np.empty(0, ROW))
        (self._partial / _REPORT).write_text(json.dumps(asdict(report), indent=1), encoding="utf-8")
        for name in (_TOKENS, _ROWS, _REPORT):
            with (self._partial / name).open("rb") as file:
                os.fsync(file.fileno())
        try:
            self._partial.rename(self._final)
        except OSError:
            if not self._final.is_dir():
                raise


class PairStore:
    """The memory-mapped rows of a store. In messages `locations[file]` stands before a row's line number."""

    def __init__(self, directory: Path, locations: Sequence[str]) -> None:
        try:
            self.rows: np.ndarray = np.load(directory / _ROWS, mmap_mode="r")
            if self.rows.dtype != ROW:
                raise ValueError(f"{_ROWS} holds no records of pairs")
            self.report = PreparationReport(**json.loads((directory / _REPORT).read_text(encoding="utf-8")))
            size = (directory / _TOKENS).stat().st_size
            if size != TOKEN.itemsize * _num_tokens(self.rows):
                raise ValueError(f"{_TOKENS} has {size} bytes, {_ROWS} describes {_num_tokens(self.rows)} tokens")
        except (OSError, EOFError, ValueError, TypeError) as error:
            raise DataError(
                f"{directory}: tokenized pairs can't be read ({error}); data.cache_dir must be on a file system that "
                "all ranks share. Remove the directory if it is damaged"
            ) from error
        # An empty file can't be memory-mapped.
        self.tokens = np.empty(0, TOKEN) if size == 0 else np.memmap(directory / _TOKENS, dtype=TOKEN, mode="r")
        self.locations = tuple(locations)

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, row: int) -> str:
        """FILE:LINE of a row."""
        record = self.rows[row]
        return f"{self.locations[record['file']]}{record['line']}"


def _num_tokens(rows: np.ndarray) -> int:
    """Number of token ids of all rows, computed from the last row."""
    last = rows[-1:]
    return int((last["start"] + last["prompt"] + last["chosen"] + last["rejected"]).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class PairCounts:
    """Counts of a data set's rows by what happened to them: read = kept + skipped + all that are dropped.

    The fields from `kept` to `duplicate` count kept pairs; a duplicate has the token ids of an earlier kept pair.
    """

    read: int
    kept: int
    truncated_prompt: int
    truncated_chosen: int
    truncated_rejected: int
    boundary_merged: int
    double_bos: int
    equal_responses: int
    duplicate: int
    skipped: int
    dropped_long_prompt: int
    dropped_long_response: int
    dropped_too_long: int
    dropped_empty_response: int


def described_counts(counts: PairCounts, max_length: int) -> list[tuple[str, int]]:
    """Descriptions and counts of lost rows, and of kept pairs that deserve attention; zeros are left out."""
    told = [
        ("rows skipped, they can't be used", counts.skipped),
        (f"pairs dropped, the prompt alone reaches {max_length} tokens", counts.dropped_long_prompt),
        (f"pairs dropped, a response alone reaches {max_length} tokens", counts.dropped_long_response),
        (f"pairs dropped, longer than {max_length} tokens", counts.dropped_too_long),
        ("pairs dropped, nothing of a response is there to score", counts.dropped_empty_response),
        ("prompts that lose their beginning", counts.truncated_prompt),
        ("chosen responses cut", counts.truncated_chosen),
        ("rejected responses cut", counts.truncated_rejected),
        ("pairs with equal responses, kept", counts.equal_responses),
        ("pairs that repeat an earlier one, kept", counts.duplicate),
        ("pairs whose responses start before the end of the prompt", counts.boundary_merged),
        ("pairs with a second BOS at the start, removed", counts.double_bos),
    ]
    return [(what, number) for what, number in told if number]


class PairView(Sequence[TokenizedPair]):
    """The pairs of a store that are kept at a length limit, in the order of the data.

    `counts` counts all rows, `digest` is a hash of the kept token ids. Lengths with `full_` are those before
    truncation.
    """

    def __init__(self, store: PairStore, rows_n: RowNumbers, cut: Cut, counts: PairCounts) -> None:
        self._store = store
        self._skip_n = cut.prompt_skip_n
        self.rows_n = rows_n
        self.counts = counts
        self.full_prompt_lengths: Lengths = store.rows["prompt"][rows_n]
        self.full_chosen_lengths: Lengths = store.rows["chosen"][rows_n]
        self.full_rejected_lengths: Lengths = store.rows["rejected"][rows_n]
        self.prompt_lengths: Lengths = self.full_prompt_lengths - cut.prompt_skip_n
        self.chosen_lengths = cut.chosen_n
        self.rejected_lengths = cut.rejected_n
        self.digest = self._hash()

    def __len__(self) -> int:
        return len(self.rows_n)

    @overload
    def __getitem__(self, item: int) -> TokenizedPair: ...

    @overload
    def __getitem__(self, item: slice) -> list[TokenizedPair]: ...

    def __getitem__(self, item: int | slice) -> TokenizedPair | list[TokenizedPair]:
        if isinstance(item, slice):
            return [self[i] for i in range(*item.indices(len(self)))]
        row = int(self.rows_n[item])
        start = int(self._store.rows["start"][row])
        chosen_start = start + int(self.full_prompt_lengths[item])
        rejected_start = chosen_start + int(self.full_chosen_lengths[item])
        tokens = self._store.tokens
        return TokenizedPair(
            index=row,
            prompt=np.asarray(tokens[start + int(self._skip_n[item]) : chosen_start]),
            chosen=np.asarray(tokens[chosen_start : chosen_start + int(self.chosen_lengths[item])]),
            rejected=np.asarray(tokens[rejected_start : rejected_start + int(self.rejected_lengths[item])]),
            where=self._store.where(row),
        )

    def where(self, row: int) -> str:
        """FILE:LINE of a pair, given its `index`, which is its row in the data."""
        return self._store.where(row)

    def stream_lengths(self, *, share_prompt: bool) -> npt.NDArray[np.int64]:
        """Number of each pair's tokens in a stream; without sharing, its logical tokens."""
        lengths = (self.prompt_lengths, self.chosen_lengths, self.rejected_lengths)
        prompt, chosen, rejected = (part.astype(np.int64) for part in lengths)
        return stream_tokens(prompt, chosen, rejected, share_prompt=share_prompt)

    @property
    def longest_sequence(self) -> int:
        """Number of tokens of the longest prompt + response."""
        return int((self.prompt_lengths + np.maximum(self.chosen_lengths, self.rejected_lengths)).max())

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises DataError at the first pair with a token id outside a vocabulary of `vocab_size`."""
        largest_n = self._store.rows["largest"][self.rows_n]
        beyond = np.flatnonzero(largest_n >= vocab_size)
        if beyond.size:
            row = int(self.rows_n[beyond[0]])
            raise DataError(
                f"{self._store.where(row)}: pair {row} has token id {largest_n[beyond[0]]}, the model's vocabulary has "
                f"{vocab_size} entries: the tokenizer belongs to another model, or tokens were added to it without "
                f"resizing the embeddings ({beyond.size} such pairs)"
            )

    def _hash(self) -> str:
        """Hash of the kept token ids, computed from the rows' hashes and the part of each that is kept."""
        sha = hashlib.sha256(self._store.rows["digest"][self.rows_n].tobytes())
        for lengths_n in (self._skip_n, self.chosen_lengths, self.rejected_lengths):
            sha.update(np.ascontiguousarray(lengths_n, dtype=TOKEN).tobytes())
        return sha.hexdigest()


def select_pairs(store: PairStore, rows: RowNumbers, *, max_length: int, truncation: str, title: str) -> PairView:
    """Selects the pairs among these rows of a store that are kept at `max_length`; see `cut_to_length`.

    Raises DataError with the reasons if none is left, and with `truncation` error at the first pair that is too long.
    `title` names the pairs in messages.
    """
    records = store.rows[rows]
    good = (records["flags"] & BAD) == 0
    read, rows, records = len(rows), rows[good], records[good]
    cut = cut_to_length(
        records["prompt"], records["chosen"], records["rejected"], max_length=max_length, mode=truncation
    )
    too_long = cut.outcome_n == Outcome.TOO_LONG
    if truncation == "error" and too_long.any():
        first = int(np.flatnonzero(too_long)[0])
        longest = int(records["prompt"][first] + max(records["chosen"][first], records["rejected"][first]))
        raise DataError(
            f"{store.where(int(rows[first]))}: the pair has {longest} tokens, data.max_length={max_length} and "
            f"data.truncation=error ({int(too_long.sum())} such {title}): raise data.max_length, or choose "
            "keep_start, keep_end or drop"
        )
    kept = cut.outcome_n == Outcome.KEPT
    counts = _count(records, cut, kept, read)
    if not kept.any():
        raise DataError(_nothing_left(counts, max_length, title, store.report.problems))
    own = Cut(cut.outcome_n[kept], cut.prompt_skip_n[kept], cut.chosen_n[kept], cut.rejected_n[kept])
    return PairView(store, rows[kept], own, counts)


def _count(records: np.ndarray, cut: Cut, kept: npt.NDArray[np.bool_], read: int) -> PairCounts:
    def flagged(flag: int) -> int:
        return int(((records["flags"] & flag) != 0)[kept].sum())

    dropped = np.bincount(cut.outcome_n, minlength=len(Outcome))
    num_kept = int(kept.sum())
    return PairCounts(
        read=read,
        kept=num_kept,
        truncated_prompt=int((cut.prompt_skip_n > 0)[kept].sum()),
        truncated_chosen=int((cut.chosen_n < records["chosen"])[kept].sum()),
        truncated_rejected=int((cut.rejected_n < records["rejected"])[kept].sum()),
        boundary_merged=flagged(BOUNDARY_MERGED),
        double_bos=flagged(DOUBLE_BOS),
        equal_responses=flagged(EQUAL),
        duplicate=num_kept - len(np.unique(np.ascontiguousarray(records["digest"][kept]))),
        skipped=read - len(records),
        dropped_long_prompt=int(dropped[Outcome.LONG_PROMPT]),
        dropped_long_response=int(dropped[Outcome.LONG_RESPONSE]),
        dropped_too_long=int(dropped[Outcome.TOO_LONG]),
        dropped_empty_response=int(dropped[Outcome.EMPTY_RESPONSE]),
    )


def _nothing_left(counts: PairCounts, max_length: int, title: str, problems: Sequence[str]) -> str:
    told = "; ".join(f"{what}: {number}" for what, number in described_counts(counts, max_length))
    too_long = counts.dropped_long_prompt + counts.dropped_long_response + counts.dropped_too_long
    remedy = "raise data.max_length, or look at the data" if too_long else "look at the data and the chat template"
    first = f"; the first that was skipped: {problems[0]}" if problems else ""
    return f"none of the {counts.read} {title} is left at data.max_length={max_length} ({told}): {remedy}{first}"
