#!/usr/bin/env python3
"""Measures conversions of a large model: time, and the peak of host memory beside a bound that no model's size is in.

    python tools/bench/conversion.py [--layers 40] [--hidden 1536] [--ffn 4096] [--vocab 32768] [--ranks 1]

Makes a model of random bf16 weights, 2.2 GB by default, and imports, verifies and exports it with tools/convert.py,
each in processes of its own. "Bare" is what the same command takes for a model of 4 MB: the interpreter and its
libraries. Memory is the kernel's peak of the resident set, of the largest process. Needs three times the model on disk,
in a directory that is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this clone's package, whatever is installed

from megadpo.models.conversion.mapping import hf_shapes
from megadpo.models.conversion.safetensors_writer import BlockWriter, finish_files, lay_out, new_files
from megadpo.models.hf_config import read_architecture
from megadpo.runtime.progress import ByteProgress
from megadpo.runtime.rank_logging import configure_logging, silence_libraries

_CONVERT = Path(__file__).resolve().parents[1] / "convert.py"
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a command: seconds, and the peak of its largest process's resident set in MiB."""

    seconds: float
    peak_mib: float


def main(arguments: Sequence[str]) -> int:
    """Runs the measurement of the command line; returns 0 if every conversion is within the bound, else 1."""
    options = _parser().parse_args(arguments)
    configure_logging()
    silence_libraries()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        small, large = Path(scratch) / "small", Path(scratch) / "large"
        write_random_model(small, layers=options.ranks, hidden=512, ffn=512, vocab=1024)
        write_random_model(large, layers=options.layers, hidden=options.hidden, ffn=options.ffn, vocab=options.vocab)
        bare, costs = _conversions(small, options.ranks), _conversions(large, options.ranks)
        size, largest = _sizes_mib(large)
    bound = 2.5 * largest + 1024
    title = f"{size:.0f} MiB of weights, the largest tensor {largest:.0f} MiB, {options.ranks} processes"
    table = Table("conversion", "s", "s bare", "peak MiB", "bare", "difference", "bound", title=title)
    for name, cost in costs.items():
        seconds = [f"{seconds:.1f}" for seconds in (cost.seconds, bare[name].seconds)]
        peaks = (cost.peak_mib, bare[name].peak_mib, cost.peak_mib - bare[name].peak_mib, bound)
        table.add_row(name, *seconds, *(f"{mib:.0f}" for mib in peaks))
    Console(width=120).print(table)
    return 0 if all(cost.peak_mib - bare[name].peak_mib <= bound for name, cost in costs.items()) else 1


def write_random_model(directory: Path, *, layers: int, hidden: int, ffn: int, vocab: int) -> None:
    """Writes a Llama with random bf16 weights and heads of 64, without tokenizer, one tensor in memory at a time."""
    directory.mkdir()
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 256,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(fields))
    shapes = hf_shapes(read_architecture(directory))
    layout = lay_out({name: (shape, torch.bfloat16) for name, shape in shapes.items()}, max_shard_bytes=10**9)
    generator = torch.Generator().manual_seed(0)
    with new_files(directory, layout):
        with ByteProgress("making a model", visible=True) as bar, BlockWriter(directory, layout) as writer:
            bar.begin(layout.nbytes)
            for name, shape in shapes.items():
                writer.write(name, torch.randn(shape, generator=generator, dtype=torch.bfloat16))
                bar.advance(layout.spans[name].nbytes)
        finish_files(directory, layout)


def _conversions(model: Path, ranks: int) -> dict[str, Cost]:
    """Measures the cost of each conversion of a model."""
    checkpoint, back = f"{model}-checkpoint", f"{model}-back"
    words = {
        "import": ["--hf", str(model), "--out", checkpoint],
        "verify": ["--hf", str(model), "--checkpoint", checkpoint],
        "export": ["--checkpoint", checkpoint, "--out", back],
    }
    return {name: _run([name, *its_words, "--device", "cpu"], ranks) for name, its_words in words.items()}


def _run(words: Sequence[str], ranks: int) -> Cost:
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *launcher, str(_CONVERT), *words], stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)} failed:\n{said.decode(errors='replace')}")
    return Cost(time.perf_counter() - started, usage.ru_maxrss * 1024 / _MIB)


def _sizes_mib(model: Path) -> tuple[float, float]:
    """Sizes of all weights of a bf16 model, and of its largest tensor."""
    sizes = [2 * torch.Size(shape).numel() / _MIB for shape in hf_shapes(read_architecture(model)).values()]
    return sum(sizes), max(sizes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--hidden", type=int, default=1536, help="a multiple of 256")
    parser.add_argument("--ffn", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--ranks", type=int, default=1, help="processes that share the work")
    parser.add_argument("--scratch", type=Path, help="where the model and its copies are made")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
