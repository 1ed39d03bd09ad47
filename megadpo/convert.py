"""Whole conversions: a Hugging Face directory to a checkpoint that stands alone, and a checkpoint back.

The ranks of the launch are pipeline stages, so the weights are in memory once, whatever their number.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from megadpo import __version__
from megadpo.assembly import TORCH_DTYPES
from megadpo.checkpoint import load_weights, save_imported
from megadpo.checkpoint_files import (
    HF_DIRECTORY,
    ImportedModel,
    is_trained,
    read_imported,
    read_training_state,
    stored_dtype,
    trained_setting,
)
from megadpo.config.schema import Dtype
from megadpo.device import Device
from megadpo.errors import ConfigError
from megadpo.export import conversion_card, export_model
from megadpo.models.builder import build_model, load_model
from megadpo.models.conversion.load_save import check_hf_weights
from megadpo.models.conversion.side_files import read_side_files
from megadpo.models.hf_config import Architecture, read_architecture
from megadpo.models.options import ModelOptions
from megadpo.models.policy import PolicyModel
from megadpo.parallel.collectives import on_main
from megadpo.parallel.state import ParallelState
from megadpo.rank_logging import get_logger, global_rank, launched_world_size
from megadpo.session import open_pipeline

logger = get_logger(__name__)

_DTYPE_NAMES = {"bfloat16": Dtype.bf16, "float32": Dtype.fp32}


def import_model(hf_dir: Path, out: Path, *, dtype: Dtype | None, device_kind: str) -> None:
    """Writes the weights in `hf_dir` as the checkpoint `out`, in `dtype` (None: the one that config.json names).

    On all ranks of the launch. `out` must not exist, or be empty.
    """
    arch = read_architecture(hf_dir)
    dtype = dtype or _config_dtype(hf_dir)
    with open_pipeline(stages(arch), device_kind) as (state, device):
        on_main(lambda: check_hf_weights(arch, hf_dir))
        side_files = on_main(lambda: read_side_files(hf_dir))
        with told(f"reading {hf_dir}"):
            options = ModelOptions(device=device, dtype=TORCH_DTYPES[dtype], sequence_parallel=False)
            chunks = load_model(arch, state, hf_dir, options)
        with told(f"writing {arch.num_parameters:,} parameters in {dtype} to {out}"):
            description = ImportedModel(
                source=str(hf_dir.resolve()),
                dtype=str(dtype),
                vocab_size=arch.vocab_size,
                megadpo_version=__version__,
            )
            save_imported(out, chunks, description, side_files=side_files, dtype=TORCH_DTYPES[dtype])


def export_checkpoint(checkpoint: Path, out: Path, *, dtype: Dtype | None, device_kind: str) -> None:
    """Writes a checkpoint as the Hugging Face directory `out`, in `dtype` (None: the one that its weights have).

    On all ranks of the launch. `out` must not exist, or be empty.
    """
    source, stored = checkpoint / HF_DIRECTORY, stored_dtype(checkpoint)
    arch = read_architecture(source)
    dtype = dtype or stored
    with open_pipeline(stages(arch), device_kind) as (state, device):
        side_files = on_main(lambda: read_side_files(source))
        chunks = load_whole(checkpoint, arch, state, device, stored)
        with told(f"writing {arch.num_parameters:,} parameters in {dtype} to {out}"):
            card = conversion_card(name=out.name, checkpoint=str(checkpoint), origin=_origin(checkpoint))
            export_model(chunks, arch, side_files, out, state=state, dtype=TORCH_DTYPES[dtype], card=card)


def load_whole(
    checkpoint: Path, arch: Architecture, state: ParallelState, device: Device, dtype: Dtype
) -> list[PolicyModel]:
    """This rank's chunks of a checkpoint's model, in `dtype`. Collective over all ranks."""
    with told(f"reading {checkpoint}"):
        options = ModelOptions(device=device, dtype=TORCH_DTYPES[dtype], sequence_parallel=False)
        chunks = build_model(arch, state, options)
        load_weights(checkpoint, chunks, vocab_size=arch.vocab_size)
    return chunks


def stages(arch: Architecture) -> int:
    """Pipeline stages: one for each process of the launch. ConfigError where they can't share the layers out evenly."""
    world = launched_world_size()
    if arch.num_layers % world:
        fitting = [str(n) for n in range(1, arch.num_layers + 1) if arch.num_layers % n == 0]
        raise ConfigError(
            f"--nproc-per-node={world}: must divide the model's {arch.num_layers} layers, which the processes share: "
            f"use one of {', '.join(fitting)}"
        )
    return world


@contextmanager
def told(what: str) -> Iterator[None]:
    """Logs how long something took; meanwhile a spinner turns, on rank 0 in a terminal."""
    started = time.perf_counter()
    with Console(stderr=True, quiet=global_rank() != 0).status(what):
        yield
    logger.info("%s: %.1f s", what, time.perf_counter() - started)


def _config_dtype(hf_dir: Path) -> Dtype:
    """Format that config.json names. It is JSON: read_architecture has parsed it."""
    fields = json.loads((hf_dir / "config.json").read_text(encoding="utf-8"))
    name = fields.get("dtype") or fields.get("torch_dtype")
    if name not in _DTYPE_NAMES:
        raise ConfigError(
            f"{hf_dir / 'config.json'}: dtype = {json.dumps(name)}: must be {' or '.join(_DTYPE_NAMES)} to be kept: "
            "choose a format with --dtype bf16 or --dtype fp32"
        )
    return _DTYPE_NAMES[name]


def _origin(checkpoint: Path) -> str:
    """Where the weights come from, for the model card."""
    if is_trained(checkpoint):
        steps = read_training_state(checkpoint).step
        return f"Trained for {steps} steps from {trained_setting(checkpoint, 'model.name')}."
    return f"Imported from {read_imported(checkpoint).source}."
