"""Whole conversions: a Hugging Face directory to a checkpoint that stands alone, and a checkpoint back.

No model is built: weights go from file to file in blocks, so memory does not grow with the model. The ranks of the
launch and their threads share the blocks.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from megadpo import __version__
from megadpo.checkpoint.description import (
    ImportedModel,
    is_trained,
    read_imported,
    read_training,
    stored_dtype,
    trained_setting,
)
from megadpo.checkpoint.directory import HF_DIRECTORY
from megadpo.checkpoint.saver import save_imported
from megadpo.checkpoint.state import (
    NOT_WEIGHTS,
    WEIGHTS_FROM,
    check_fitting,
    check_undamaged,
    check_vocabulary,
    readable,
)
from megadpo.config.choices import Dtype
from megadpo.errors import ConfigError
from megadpo.models.conversion.dcp import BoxReader
from megadpo.models.conversion.export import conversion_card, write_model
from megadpo.models.conversion.load_save import check_hf_weights
from megadpo.models.conversion.mapping import hf_shapes
from megadpo.models.conversion.safetensors_writer import BlockWriter, FileLayout, finish_files, lay_out, new_files
from megadpo.models.conversion.side_files import read_side_files
from megadpo.models.conversion.stored import HFBlock, stored_problems
from megadpo.models.conversion.streaming import Worker, for_each_stored_block, store_hf_weights
from megadpo.models.hf_config import Architecture, read_architecture
from megadpo.runtime.collectives import on_every, on_main
from megadpo.runtime.cpus import usable_cpus
from megadpo.runtime.progress import ByteProgress
from megadpo.runtime.rank_logging import get_logger, global_rank
from megadpo.setup.backend import TORCH_DTYPES
from megadpo.setup.session import open_world

logger = get_logger(__name__)

_DTYPE_NAMES = {"bfloat16": Dtype.bf16, "float32": Dtype.fp32}
# More threads hold more blocks, and one that waits for the disk should not leave it idle.
_FEWEST_THREADS, _MOST_THREADS = 2, 4


def import_model(hf_dir: Path, out: Path, *, dtype: Dtype | None, device_kind: str) -> None:
    """Writes the weights in `hf_dir` as the checkpoint `out`, in `dtype` (None: the one that config.json names).

    On all ranks of the launch. `out` must not exist, or be empty.
    """
    arch = read_architecture(hf_dir)
    dtype = dtype or _config_dtype(hf_dir)
    with open_world(device_kind):
        on_main(lambda: check_hf_weights(arch, hf_dir))
        side_files = on_main(lambda: read_side_files(hf_dir))
        description = ImportedModel(
            source=str(hf_dir.resolve()), dtype=str(dtype), vocab_size=arch.vocab_size, megadpo_version=__version__
        )
        with at_work(f"writing {arch.num_parameters:,} parameters in {dtype} to {out}") as worker:
            save_imported(
                out,
                lambda directory: store_hf_weights(arch, hf_dir, directory, dtype=TORCH_DTYPES[dtype], worker=worker),
                description,
                side_files=side_files,
                dtype=TORCH_DTYPES[dtype],
            )


def export_checkpoint(checkpoint: Path, out: Path, *, dtype: Dtype | None, device_kind: str) -> None:
    """Writes a checkpoint as the Hugging Face directory `out`, in `dtype` (None: the one that its weights have).

    On all ranks of the launch. `out` must not exist, or be empty.
    """
    source, stored = checkpoint / HF_DIRECTORY, Dtype(stored_dtype(checkpoint))
    arch = read_architecture(source)
    dtype = dtype or stored
    with open_world(device_kind):
        side_files = on_main(lambda: read_side_files(source))
        reader = open_weights(checkpoint, arch)
        card = conversion_card(name=out.name, checkpoint=str(checkpoint), origin=_origin(checkpoint))
        with at_work(f"writing {arch.num_parameters:,} parameters in {dtype} to {out}") as worker:

            def write(directory: Path) -> None:
                layout = lay_out({name: (shape, TORCH_DTYPES[dtype]) for name, shape in hf_shapes(arch).items()})
                with ExitStack() as stack:
                    on_main(lambda: stack.enter_context(new_files(directory, layout)))
                    on_every(
                        lambda: _write_share(
                            checkpoint, arch, reader, directory, layout, stored=TORCH_DTYPES[stored], worker=worker
                        )
                    )
                    on_main(lambda: finish_files(directory, layout))

            write_model(write, side_files, out, dtype=TORCH_DTYPES[dtype], card=card)


def open_weights(checkpoint: Path, arch: Architecture) -> BoxReader:
    """Reads a checkpoint's weights on this rank; CheckpointError on all ranks unless they are those of the model.

    Collective over all ranks.
    """

    check_undamaged(checkpoint, WEIGHTS_FROM)

    def open_here() -> BoxReader:
        check_vocabulary(checkpoint, arch.vocab_size)
        with readable(checkpoint, WEIGHTS_FROM):
            reader = BoxReader(checkpoint)
        tensors = {key: entry for key, entry in reader.tensors().items() if not key.startswith(NOT_WEIGHTS)}
        check_fitting(checkpoint, stored_problems(arch, tensors))
        return reader

    return on_every(open_here)


@contextmanager
def at_work(what: str) -> Iterator[Worker]:
    """The worker of this rank for the duration of the context; rank 0 shows progress, and logs the time at the end."""
    started = time.perf_counter()
    with ByteProgress(what, visible=global_rank() == 0) as bar:
        yield Worker(
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            threads=_threads(),
            begin=bar.begin,
            advance=bar.advance,
        )
    logger.info("%s: %.1f s", what, time.perf_counter() - started)


def _threads() -> int:
    """Threads of one rank: the processes of a machine share its CPUs."""
    share = usable_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(_FEWEST_THREADS, min(_MOST_THREADS, share))


def _write_share(
    checkpoint: Path,
    arch: Architecture,
    reader: BoxReader,
    directory: Path,
    layout: FileLayout,
    *,
    stored: torch.dtype,
    worker: Worker,
) -> None:
    with BlockWriter(directory, layout) as writer:

        def write(block: HFBlock) -> None:
            writer.write(block.name, block.values.to(stored), row=block.row, column=block.column)

        with readable(checkpoint, WEIGHTS_FROM):
            for_each_stored_block(arch, reader, write, worker=worker)
        writer.flush()


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
    """The origin of the weights as a sentence for the model card."""
    if is_trained(checkpoint):
        _, progress = read_training(checkpoint)
        return f"Trained for {progress.step} steps from {trained_setting(checkpoint, 'model.name')}."
    return f"Imported from {read_imported(checkpoint).source}."
