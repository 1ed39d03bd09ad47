"""What is no file is refused, and not waited for: a pipe has nobody at its other end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from megadpo.checkpoint.state import readable
from megadpo.errors import CheckpointError, ConversionError
from megadpo.models.hf_config import read_architecture


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    """Ends what waits for longer than seconds."""

    def fail(*_: object) -> None:
        pytest.fail("waits for the pipe")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_a_pipe_is_no_configuration(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConversionError, match=r"/config\.json is not a file; download it again"):
        read_architecture(tmp_path)


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp"])
def test_a_pipe_is_no_part_of_a_checkpoint(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with (
        pytest.raises(CheckpointError, match=rf"{name} is not a file; name another one with KEY=DIR"),
        readable(tmp_path, "KEY=DIR"),
    ):
        (tmp_path / name).read_bytes()


def test_files_and_directories_are_read(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "common.pt").write_bytes(b"x")
    with readable(tmp_path, "KEY=DIR"):
        assert (tmp_path / "common.pt").read_bytes() == b"x"
