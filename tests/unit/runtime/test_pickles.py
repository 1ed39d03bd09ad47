"""A checkpoint runs no program: its pickles hold what they should, or are refused before anything is called."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata
from torch.distributed.checkpoint.planner import WriteItemType

from megadpo.errors import CheckpointError
from megadpo.models.conversion.dcp import BoxReader
from megadpo.runtime.pickles import _NAMES, data_only_unpickling
from tests.helpers.hostile import HOSTILE, edit_metadata, in_common, in_metadata

STATE = {"layers.w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "step": 3}


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint of tensors and an object, in a world of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    checkpoint.save(dict(STATE), checkpoint_id=tmp_path / "saved")
    yield tmp_path / "saved"
    dist.destroy_process_group()


def load(directory: Path) -> dict[str, Any]:
    state: dict[str, Any] = {key: value * 0 for key, value in STATE.items()}
    with data_only_unpickling(directory):
        checkpoint.load(state, checkpoint_id=directory)
    return state


def test_what_is_data_is_read(saved: Path) -> None:
    state = load(saved)
    assert state["step"] == 3
    assert all(torch.equal(state[name], STATE[name]) for name in ("layers.w", "b"))
    assert set(BoxReader(saved).tensors()) == {"layers.w", "b"}


@pytest.mark.parametrize("name", ["metadata", "tensor"])
def test_a_program_is_refused_and_not_run(saved: Path, tmp_path: Path, name: str) -> None:
    HOSTILE[name](saved, tmp_path / "mark")
    with pytest.raises((CheckpointError, checkpoint.CheckpointException), match=r"posix\.mkdir.*\n?.*Don't trust this"):
        load(saved)
    assert not (tmp_path / "mark").exists()
    checkpoint.load(dict(STATE), checkpoint_id=saved)  # what torch does by itself
    assert (tmp_path / "mark").exists()


def test_the_reader_of_boxes_runs_nothing(saved: Path, tmp_path: Path) -> None:
    in_metadata(saved, tmp_path / "mark")
    with pytest.raises(CheckpointError, match=r"^.*saved/\.metadata: would run or make posix\.mkdir, .*; get it again"):
        BoxReader(saved)
    assert not (tmp_path / "mark").exists()


def test_objects_of_plain_files_are_data(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_common(saved, tmp_path / "mark")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for options in ({}, {"weights_only": False}, {"map_location": "cpu"}):
        with (
            data_only_unpickling(saved),
            pytest.raises(CheckpointError, match=r"common\.pt: holds more than .*posix\.mkdir"),
        ):
            torch.load(saved / "common.pt", **options)
    assert not (tmp_path / "mark").exists()


# Ways to a function that a list of modules, or of first names, would let through.
NAMES = [
    ("builtins", "eval"),
    ("builtins", "getattr"),
    ("torch", "load"),
    ("torch", "Size.__new__"),
    ("torch.distributed.checkpoint.filesystem", "os.system"),
    ("torch.distributed.checkpoint.filesystem", "pickle"),
    ("torch.distributed.checkpoint.metadata", "Metadata.__init__.__globals__"),
    ("torch.distributed.checkpoint.metadata", "os"),
    ("torch.storage", "_load_from_bytes"),
    ("functools", "partial"),
    ("os", "mkdir"),
]


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_names_are_found_as_they_are_listed_or_not_at_all(saved: Path, module: str, name: str) -> None:
    text = "".join(f"\x8c{chr(len(part))}{part}" for part in (module, name))
    (saved / ".metadata").write_bytes(b"\x80\x04" + text.encode("latin-1") + b"\x93.")
    with (
        pytest.raises(CheckpointError, match=rf"metadata: would run or make {module}\.{name}"),
        data_only_unpickling(saved),
    ):
        FileSystemReader(saved).read_metadata()


def read_metadata(saved: Path, pickled: bytes) -> None:
    (saved / ".metadata").write_bytes(pickled)
    with data_only_unpickling(saved):
        FileSystemReader(saved).read_metadata()


def named(module: str, name: str) -> bytes:
    """The operations that find a name."""
    return b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name)) + b"\x93"


METADATA, PLANNER = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"
INDEX = named(METADATA, "MetadataIndex")
# (None, {name: value}), which unpickling sets one by one on whatever stands before.
CHANGES = {
    "method": (INDEX, b"\x8c\x08__hash__" + named("torch.serialization", "_get_layout")),
    "new name": (INDEX, b"\x8c\x03fqn\x8c\x01x"),
    "bases": (
        named(PLANNER, "WriteItemType"),
        b"\x8c\x09__bases__" + named(METADATA, "_MEM_FORMAT_ENCODING") + b"\x85",
    ),
    "path": (named("pathlib", "PosixPath"), b"\x8c\x04name\x8c\x01x"),
    "member": (named(PLANNER, "WriteItemType") + b"K\x01\x85R", b"\x8c\x07_value_K\x07"),
    "member's class": (named(PLANNER, "WriteItemType") + b"K\x01\x85R", b"\x8c\x09__class__" + INDEX),
}


@pytest.mark.parametrize("change", CHANGES)
def test_classes_of_the_program_stay_as_they_are(saved: Path, change: str) -> None:
    listed = [thing for thing in _NAMES.values() if isinstance(thing, type)]
    things = [*listed, *WriteItemType, *_MEM_FORMAT_ENCODING]
    before = [(type(thing), dict(vars(thing)), thing.__bases__ if thing in listed else ()) for thing in things]
    inst, pair = CHANGES[change]
    good = (saved / ".metadata").read_bytes()
    hostile = b"\x80\x04" + inst + b"N}" + pair + b"s\x86b0" + good.removeprefix(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"metadata: would change .*, which the whole program uses\. Don't trust"):
        read_metadata(saved, hostile)
    assert [(type(thing), dict(vars(thing)), thing.__bases__ if thing in listed else ()) for thing in things] == before
    read_metadata(saved, good)


def test_metadata_take_no_more_memory_than_they_have_bytes(saved: Path) -> None:
    """LONG_BINPUT at 200 million takes 1.6 GB of pointers, and more while it makes room."""
    put = b"r" + (200_000_000).to_bytes(4, "little")
    text = b"X" + (5).to_bytes(4, "little") + b"raaaa0"
    good = (saved / ".metadata").read_bytes().removeprefix(b"\x80\x04")
    read_metadata(saved, b"\x80\x04" + text + good)  # no operation but a text
    with pytest.raises(CheckpointError, match=r"has operation 0x72 at byte 3, they need none like it\. Don't trust"):
        read_metadata(saved, b"\x80\x04N" + put + b"0" + good)


@pytest.mark.parametrize("protocol", [4, 5])
def test_pickles_of_python_3_8_and_newer_are_read(saved: Path, protocol: int) -> None:
    content = pickle.loads((saved / ".metadata").read_bytes())
    read_metadata(saved, pickle.dumps(content, protocol=protocol))


@pytest.mark.parametrize("path", ["../other/__0_0.distcp", "/etc/passwd", "sub/__0_0.distcp", "..", ""])
def test_metadata_that_lead_out_of_the_directory_are_refused(saved: Path, path: str) -> None:
    def edit(metadata: Metadata) -> Metadata:
        index, place = next(iter(metadata.storage_data.items()))
        metadata.storage_data[index] = type(place)(path, 0, 10)
        return metadata

    edit_metadata(saved, edit)
    with pytest.raises(CheckpointError, match=r"\.metadata: names a file that doesn't lie beside it: .*Don't trust"):
        BoxReader(saved)


def test_an_error_is_short_whatever_a_pickle_made(saved: Path) -> None:
    def edit(metadata: Metadata) -> Metadata:
        index, place = next(iter(metadata.storage_data.items()))
        endless: Any = ()
        for _ in range(30):  # whose text would have 2 ** 30 letters
            endless = (endless, endless)
        metadata.storage_data[index] = type(place)(endless, 0, 10)
        return metadata

    edit_metadata(saved, edit)
    with pytest.raises(CheckpointError, match="names a file that doesn't lie beside it: a tuple"):
        BoxReader(saved)


@pytest.mark.parametrize("edit", [lambda m: {"state_dict_metadata": {}}, lambda m: m.storage_data, lambda m: None])
def test_metadata_that_are_none_are_refused(saved: Path, edit: Callable[[Metadata], Any]) -> None:
    edit_metadata(saved, edit)
    with pytest.raises(CheckpointError, match=r"\.metadata: holds no metadata of a checkpoint but a (dict|NoneType)"):
        BoxReader(saved)


def test_afterwards_torch_is_as_it_was(saved: Path) -> None:
    before = torch.load, checkpoint.filesystem.pickle
    load(saved)
    assert (torch.load, checkpoint.filesystem.pickle) == before == (before[0], pickle)
    buffer = io.BytesIO()
    torch.save(os.path.join, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False) is os.path.join
