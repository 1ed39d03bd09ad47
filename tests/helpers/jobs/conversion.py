"""What the ranks of a conversion or scoring test do; module-level functions that `launch` can send."""

from __future__ import annotations

import io
import os
import resource
import signal
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from megadpo.checkpoint import state as checkpoint
from megadpo.checkpoint.directory import find_checkpoint
from megadpo.checkpoint.state import load_weights
from megadpo.checkpoint.writer import METADATA
from megadpo.commands import score as scoring
from megadpo.commands.convert import export_checkpoint, import_model
from megadpo.commands.score import run_scoring
from megadpo.commands.score_files import ScoreWriter
from megadpo.commands.score_summary import Buckets
from megadpo.commands.verify import verify
from megadpo.config.choices import Dtype
from megadpo.config.compose import compose_config
from megadpo.errors import MegaDPOError
from megadpo.models.builder import build_model, load_model
from megadpo.models.conversion import stored
from megadpo.models.conversion.load_save import global_parameters
from megadpo.models.hf_config import read_architecture
from megadpo.models.options import ModelOptions
from megadpo.models.policy import PolicyModel
from megadpo.runtime.device import megatron_device, select_device
from megadpo.runtime.parallel_state import build_parallel_state, distributed
from megadpo.setup.session import Session
from tests.helpers.jobs.fault import MeetingPlaces, captured_log
from tests.helpers.no_room import largest_file


def import_hf(hf_dir: Path, out: Path, dtype: str | None = None) -> None:
    """`convert.py import` on this rank."""
    import_model(hf_dir, out, dtype=dtype and Dtype(dtype), device_kind="cpu")


def import_hf_in_small_blocks(hf_dir: Path, out: Path) -> None:
    """`import_hf` in blocks of a thousand values, which begin and end inside the rows of a key-value head."""
    with mock.patch.object(stored, "_BLOCK_VALUES", 1000):
        import_hf(hf_dir, out)


def import_by_building_the_model(hf_dir: Path, out: Path) -> None:
    """Megatron's own save of the weights in `hf_dir`, from a model in memory."""
    device = select_device("cpu")
    arch = read_architecture(hf_dir)
    with megatron_device(device), distributed(device, timeout_s=60):
        state = build_parallel_state(tensor=1, pipeline=1, virtual_pipeline=None, seed=0, timeout_s=60)
        options = ModelOptions(device=device, dtype=torch.bfloat16, sequence_parallel=False)
        chunks = load_model(arch, state, hf_dir, options)
        out.mkdir(parents=True)
        dist_checkpointing.save(checkpoint.model_state(chunks), str(out), content_metadata=dict(METADATA))


def differing_parameters(hf_dir: Path, imported: Path, layouts: Sequence[Mapping[str, int]]) -> list[str]:
    """LAYOUT/PARAMETER of each that Megatron loads from a checkpoint otherwise than it is in `hf_dir`, on this rank."""
    device, arch = select_device("cpu"), read_architecture(hf_dir)
    different = []
    with megatron_device(device), distributed(device, timeout_s=60):
        for layout in layouts:
            parallel_state.destroy_model_parallel()
            state = build_parallel_state(**{"virtual_pipeline": None, **layout}, seed=0, timeout_s=60)  # type: ignore[arg-type]
            options = ModelOptions(device=device, dtype=torch.bfloat16, sequence_parallel=False)
            expected = load_model(arch, state, hf_dir, options)
            chunks = build_model(arch, state, options)
            load_weights(imported, chunks, vocab_size=arch.vocab_size)
            pairs = zip(global_parameters(expected), global_parameters(chunks), strict=True)
            different += [f"{layout}/{name}" for (name, a), (_, b) in pairs if not torch.equal(a, b)]
    return different


def refusals(cases: Sequence[tuple[str, Path, Path]]) -> list[str]:
    """What each of the conversions, ("import_hf" or "export_hf", FROM, TO), is refused with on this rank."""
    said, places = [], MeetingPlaces()
    for number, (name, source, target) in enumerate(cases):
        places.move(str(number))
        try:
            {"import_hf": import_hf, "export_hf": export_hf}[name](source, target)
            said.append("done")
        except MegaDPOError as error:
            said.append(f"{type(error).__name__}: {error}")
        if dist.is_initialized():
            dist.destroy_process_group()
    return said


def peaks_of_conversions(small: Path, large: Path) -> dict[str, int]:
    """Bytes by which the peak of this process's resident set grows while `large` is converted, after `small` was.

    The peak never falls: a later conversion's growth is what it needs beyond the earlier ones.
    """
    import_hf(small, small / "checkpoint")
    compare(small, small / "checkpoint")
    export_hf(small / "checkpoint", small / "back")
    marks = [_peak_bytes()]
    import_hf(large, large / "checkpoint")
    marks.append(_peak_bytes())
    equal, _ = compare(large, large / "checkpoint")
    marks.append(_peak_bytes())
    export_hf(large / "checkpoint", large / "back")
    marks.append(_peak_bytes())
    assert equal
    return {name: mark - marks[0] for name, mark in zip(("import", "verify", "export"), marks[1:], strict=True)}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def import_hf_without_room(hf_dir: Path, out: Path) -> None:
    """`import_hf` where no file may grow beyond 64 KiB."""
    with largest_file(2**16):
        import_hf(hf_dir, out)


def export_hf(checkpoint: Path, out: Path) -> None:
    """`convert.py export` on this rank."""
    export_checkpoint(find_checkpoint(checkpoint), out, dtype=None, device_kind="cpu")


def compare(hf_dir: Path, checkpoint: Path, pairs: Path | None = None) -> tuple[bool, str]:
    """`convert.py verify` on this rank: whether all is equal, and what was printed."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        equal = verify(hf_dir, find_checkpoint(checkpoint), pairs_file=pairs, max_pairs=3, device_kind="cpu")
    return equal, printed.getvalue()


def score_pairs(words: list[str], output: Path, buckets: Buckets | None = None) -> str:
    """`score.py` on this rank; what was logged."""
    with captured_log() as log:
        run_scoring(compose_config(words), output, buckets)
    return "\n".join(log)


def score_in_turns(words: list[str], output: Path) -> list[int]:
    """`score_pairs`; of each model that it loads, how many loaded before are still in memory."""
    loaded, alive = list[weakref.ref[PolicyModel]](), []

    def watched(load: Callable[[Session], list[PolicyModel]]) -> Callable[[Session], list[PolicyModel]]:
        def loading(session: Session) -> list[PolicyModel]:
            alive.append(sum(model() is not None for model in loaded))
            chunks = load(session)
            loaded.extend(map(weakref.ref, chunks))
            return chunks

        return loading

    loaders = ("load_starting_model", "load_reference_model")
    with mock.patch.multiple(scoring, **{name: watched(vars(scoring)[name]) for name in loaders}):
        score_pairs(words, output)
    return alive


def refused_scorings(cases: Sequence[list[str]], output: Path) -> list[str]:
    """What each of the scorings to one output is refused with on this rank."""
    said = []
    for words in cases:
        try:
            said.append(score_pairs(words, output))
        except MegaDPOError as error:
            said.append(str(error))
        if dist.is_initialized():
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
    return said


def score_where_nothing_can_be_written(words: list[str], output: Path) -> str:
    """The message that ends a `score_pairs` whose lines find no place."""
    with mock.patch.object(ScoreWriter, "__init__", side_effect=MegaDPOError("no place for lines")):
        try:
            return score_pairs(words, output)
        except MegaDPOError as error:
            return str(error)


def score_and_die(words: list[str], output: Path, groups: int) -> None:
    """`score_pairs` that is killed with SIGKILL before it writes the second line of a group, after so many groups."""
    write, written = ScoreWriter.write, 0

    def torn(writer: ScoreWriter, lines: Sequence[Mapping[str, Any]]) -> None:
        nonlocal written
        write(writer, lines if written < groups else lines[:1])
        written += 1
        if written > groups:
            os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(ScoreWriter, "write", torn):
        score_pairs(words, output)
