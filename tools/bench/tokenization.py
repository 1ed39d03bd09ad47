#!/usr/bin/env python3
"""Measures preparing a large preference file: pairs/s and peak memory of tokenizing it, and of drawing pairs from it.

    python tools/bench/tokenization.py --tokenizer DIR [--pairs 200000] [--workers N] [--kilobytes 2]

The pairs are generated conversations of random words, `--kilobytes` of text each. Nothing stays on disk.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this clone's package, whatever is installed

from megadpo.data.layouts import Keys
from megadpo.data.loader import epoch_order
from megadpo.data.prepare import PreparedStore, Recipe, available_cpus, open_store, prepare_store
from megadpo.data.store import select_pairs
from megadpo.runtime.progress import ProgressBar
from megadpo.runtime.rank_logging import configure_logging, silence_libraries

_MIB = 2**20


def main(arguments: list[str]) -> int:
    """Runs the measurement of the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="Hugging Face directory with a chat template")
    parser.add_argument("--pairs", type=int, default=200_000)
    parser.add_argument("--kilobytes", type=float, default=2.0, help="text of one pair")
    parser.add_argument("--workers", type=int, default=available_cpus())
    options = parser.parse_args(arguments)
    configure_logging()
    silence_libraries()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "pairs.jsonl"
        _write_pairs(path, options.pairs, round(1000 * options.kilobytes))
        before = _peak_mib(resource.RUSAGE_SELF)
        prepared = _tokenize(path, options.tokenizer, options.workers, Path(directory) / "tokens")
        after, worker = _peak_mib(resource.RUSAGE_SELF), _peak_mib(resource.RUSAGE_CHILDREN)
        print(f"peak memory: {after:.0f} MiB here ({before:.0f} before), {worker:.0f} MiB a worker")
        _draw(prepared)
        print(f"peak memory after drawing pairs: {_peak_mib(resource.RUSAGE_SELF):.0f} MiB")
    return 0


def _write_pairs(path: Path, pairs: int, characters: int) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]

    def text(share: float) -> str:
        return " ".join(rng.choices(words, k=round(share * characters / 6.5 * rng.uniform(0.2, 1.8))))

    with path.open("w", encoding="utf-8") as file, ProgressBar("writing", total=pairs, visible=True) as bar:
        for number in range(pairs):
            pair = {
                "prompt": [{"role": "user", "content": text(0.4)}],
                "chosen": [{"role": "assistant", "content": text(0.3)}],
                "rejected": [{"role": "assistant", "content": text(0.3)}],
            }
            file.write(json.dumps(pair) + "\n")
            if number % 1000 == 0:
                bar.update(number, f"{number} pairs")
    print(f"{pairs} pairs, {path.stat().st_size / _MIB:.0f} MiB")


def _tokenize(path: Path, tokenizer: Path, workers: int, cache: Path) -> PreparedStore:
    recipe = Recipe(Keys(), tokenizer, date(2025, 1, 31), skip_bad_rows=False)
    started = time.perf_counter()
    with ProgressBar("tokenizing", total=100, visible=True) as bar:
        prepared = prepare_store(
            [str(path)],
            recipe,
            cache_dir=cache,
            workers=workers,
            report=lambda share, rows: bar.update(round(100 * share), f"{rows} pairs"),
        )
    seconds = time.perf_counter() - started
    rows = len(open_store(prepared))
    tokens = (prepared.directory / "tokens.bin").stat().st_size / 4
    speed = f"{rows / seconds:.0f} pairs/s, {tokens / seconds:.0f} tokens/s"
    print(f"tokenized in {seconds:.1f} s with {workers} workers: {speed}")
    return prepared


def _draw(prepared: PreparedStore) -> None:
    """Opens the store as every rank does, and draws 100 global batches of 64 pairs in shuffled order."""
    started = time.perf_counter()
    store = open_store(prepared)
    pairs = select_pairs(store, np.arange(len(store)), max_length=2048, truncation="keep_start", title="bench pairs")
    opened = time.perf_counter()
    order = epoch_order(len(pairs), seed=0, epoch=0, shuffle=True)
    drawn = [pairs[int(i)] for i in order[:6400]]
    seconds = time.perf_counter() - opened
    print(f"opened {len(pairs)} pairs in {opened - started:.1f} s; {seconds / len(drawn) * 1e6:.0f} us to draw one")


def _peak_mib(who: int) -> float:
    return resource.getrusage(who).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
