"""The key of kept log-probs: every file that they depend on changes its part, and unchanged files are read once."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest

from megadpo.errors import CacheError
from megadpo.reference.key import PARTS, CacheKey, cache_key


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    for name in ("model-1.safetensors", "model-2.safetensors", "tokenizer.json", "chat_template.jinja"):
        (directory / name).write_text(name)
    (directory / "config.json").write_text('{"hidden_size": 64, "torch_dtype": "bfloat16"}')
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<e>", "chat_template": "one"}')
    return directory


def key_at(model: Path, precision: str = "fp32") -> CacheKey:
    return cache_key(
        weight_files=model.glob("*.safetensors"),
        config_file=model / "config.json",
        tokenizer_dir=model,
        precision=precision,
        index_dir=model.parent / "cache",
    )


@pytest.mark.parametrize(
    ("file", "content", "part"),
    [
        ("model-2.safetensors", "model-3.safetensors", "weights"),
        ("config.json", '{"hidden_size": 65}', "config"),
        ("tokenizer.json", "other", "tokenizer"),
        ("tokenizer_config.json", '{"eos_token": "<f>", "chat_template": "one"}', "tokenizer"),
        ("tokenizer_config.json", '{"eos_token": "<e>", "chat_template": "two"}', "template"),
        ("chat_template.jinja", "other", "template"),
        ("config.json", '{"hidden_size": 64, "dtype": "float32", "transformers_version": "9"}', None),
    ],
)
def test_a_changed_file_changes_its_part_of_the_key(file: str, content: str, part: str | None, model: Path) -> None:
    before = key_at(model)
    (model / file).write_text(content)
    after = key_at(model)
    assert [name for name in PARTS if before.parts[name] != after.parts[name]] == ([part] if part else [])
    assert (before.digest == after.digest) == (part is None)
    assert key_at(model, "bf16").digest != after.digest


def test_a_weight_file_is_read_once_and_again_when_it_changes(model: Path) -> None:
    before = key_at(model)
    index = model.parent / "cache" / "hashes.txt"
    whole = index.read_text()
    index.write_text(f"{whole}\n1234abcd torn")
    with mock.patch("megadpo.reference.key._hash_of_file", side_effect=AssertionError):
        assert key_at(model) == before
    (model / "model-1.safetensors").write_text("changed")
    assert key_at(model) != before
    with mock.patch("megadpo.reference.key._hash_of_file", side_effect=AssertionError):
        assert key_at(model) != before
    (model / "config.json").unlink()
    with pytest.raises(CacheError, match=r"config.json: can't be read \(No such file or directory\); kept log-probs"):
        key_at(model)


def test_a_damaged_hash_is_not_believed(model: Path) -> None:
    before, index = key_at(model), model.parent / "cache" / "hashes.txt"
    lines = [line for line in index.read_text().splitlines() if line]
    for place in range(len(lines[0])):
        damaged = bytearray(lines[0].encode())
        damaged[place] ^= 1
        index.write_bytes(bytes(damaged) + b"\n" + lines[1].encode() + b"\n")
        with mock.patch("megadpo.reference.key._hash_of_file", return_value="read again") as read:
            key_at(model)
        read.assert_called_once_with(model / "model-1.safetensors")
    index.unlink()
    assert key_at(model) == before


def test_files_that_look_alike_are_told_apart(model: Path) -> None:
    """Whoever copies them may give every file the same size and date."""
    path = model / "model-1.safetensors"
    path.write_bytes(bytes(3 * 2**20))
    before, about = key_at(model), path.stat()
    stat = Path.stat
    for place, always in ((0, about), (2**20, about), (3 * 2**20 - 1, about), (1_300_000, None)):
        content = bytearray(3 * 2**20)
        content[place] = 1
        path.write_bytes(bytes(content))
        os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (about.st_size, about.st_mtime_ns)
        # All dates the same: pieces of the content tell. No piece has changed: the time of change does.
        with mock.patch.object(Path, "stat", lambda self, a=always: a if a and self == path else stat(self)):
            after = key_at(model)
        assert [name for name in PARTS if before.parts[name] != after.parts[name]] == ["weights"]
        assert cache_key_without_index(model) == after
    path.write_bytes(bytes(3 * 2**20))
    assert key_at(model) == before


def cache_key_without_index(model: Path) -> CacheKey:
    with mock.patch("megadpo.reference.key._FileHashes", side_effect=AssertionError):
        return cache_key(
            weight_files=model.glob("*.safetensors"),
            config_file=model / "config.json",
            tokenizer_dir=model,
            precision="fp32",
            index_dir=None,
        )
