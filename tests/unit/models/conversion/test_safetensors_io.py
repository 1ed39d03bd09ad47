"""Safetensors directories: headers and slices are read, damage is named, and nothing half-written looks complete."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megadpo.errors import ConversionError
from megadpo.models.conversion.safetensors_io import SafetensorsReader
from megadpo.models.conversion.safetensors_writer import BlockWriter, FileLayout, finish_files, lay_out, new_files
from megadpo.models.conversion.side_files import read_side_files, write_side_files
from tests.helpers.safetensors_files import write_safetensors
from tests.helpers.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model in one file, and one in several."""
    root = tmp_path_factory.mktemp("models")
    return {
        "llama": write_tiny_model(root / "llama", "llama"),
        "qwen2": write_tiny_model(root / "qwen2", "qwen2", max_shard_size="100KB"),
    }


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_reader_reads_headers_and_slices(models: dict[str, Path]) -> None:
    for family, files in (("llama", 1), ("qwen2", 5)):
        hf = read_all(models[family])
        with SafetensorsReader(models[family]) as reader:
            assert {name: header.shape for name, header in reader.headers.items()} == {
                name: tuple(tensor.shape) for name, tensor in hf.items()
            }
            assert len({header.file for header in reader.headers.values()}) >= files
            name = "model.layers.1.mlp.down_proj.weight"
            assert torch.equal(reader.read(name), hf[name])
            assert torch.equal(reader.read(name, (slice(3, 9),)), hf[name][3:9])
            assert torch.equal(reader.read(name, (slice(None), slice(5, 70))), hf[name][:, 5:70])


def write_sharded(directory: Path, weight_map: dict[str, Any] | None = None) -> None:
    directory.mkdir(exist_ok=True)
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, directory / "one.safetensors")
    save_file({"c": torch.ones(2)}, directory / "two.safetensors")
    index = {"weight_map": weight_map or {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_reader_names_what_is_wrong(tmp_path: Path) -> None:
    write_sharded(tmp_path / "good")
    assert set(SafetensorsReader(tmp_path / "good").headers) == {"a", "b", "c"}
    cases: list[tuple[str, Any, str]] = [
        ("missing", lambda d: (d / "two.safetensors").unlink(), "two.safetensors does not exist"),
        (
            "headless",
            lambda d: (d / "two.safetensors").write_bytes(b"\x10\0\0"),
            "two.safetensors cannot be read: none of its 3 bytes make a safetensors header; download",
        ),
        (
            "garbled",
            lambda d: (d / "two.safetensors").write_bytes(b"\x04" + b"\0" * 7 + b"{..}" + b"\0" * 8),
            "two.safetensors cannot be read: none of its 20 bytes make a safetensors header",
        ),
        (
            "truncated",
            lambda d: (d / "two.safetensors").write_bytes((d / "two.safetensors").read_bytes()[:-3]),
            "so the download was cut off; download or export it again",
        ),
        (
            "grown",
            lambda d: (d / "two.safetensors").write_bytes((d / "two.safetensors").read_bytes() + b"\0"),
            "so something was added to it; download or export it again",
        ),
        (
            "misaligned",
            lambda d: (d / "two.safetensors").write_bytes(
                (d / "two.safetensors").read_bytes().replace(b'"shape":[2]', b'"shape":[3]')
            ),
            "download or export it again",
        ),
        (
            "pointer",
            lambda d: (d / "two.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
            "it is the pointer of Git LFS, not the weights; fetch them with git lfs pull",
        ),
        (
            "traversing",
            lambda d: write_sharded(d, {"a": "../good/one.safetensors", "b": "one.safetensors"}),
            "the bare name of a .safetensors file in the same directory. Don't trust this download:\n"
            "  a: '../good/one.safetensors'",
        ),
        ("absolute", lambda d: write_sharded(d, {"a": "/etc/passwd", "b": ".."}), "  a: '/etc/passwd'\n  b: '..'"),
        ("deep", lambda d: write_sharded(d, {"a": "sub/one.safetensors"}), "  a: 'sub/one.safetensors'"),
        ("untyped", lambda d: write_sharded(d, {"a": ["one.safetensors"]}), "  a: ['one.safetensors']"),
        (
            "undecodable",
            lambda d: (d / "model.safetensors.index.json").write_bytes(b"\xff{}"),
            "index.json cannot be read ('utf-8' codec can't decode byte 0xff",
        ),
        (
            "lying",
            lambda d: write_sharded(d, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}),
            "b is in one.safetensors, the index says two.safetensors",
        ),
        (
            "inventing",
            lambda d: write_sharded(d, dict.fromkeys("abd", "one.safetensors") | {"c": "two.safetensors"}),
            "d is not in one.safetensors",
        ),
        (
            "forgetting",
            lambda d: write_sharded(d, {"a": "one.safetensors", "c": "two.safetensors"}),
            "b in one.safetensors is not in the index",
        ),
        (
            "twice",
            lambda d: save_file({"c": torch.ones(2), "a": torch.ones(2)}, d / "two.safetensors"),
            "a lies in both one.safetensors and two.safetensors",
        ),
        ("both", lambda d: save_file({"a": torch.ones(2)}, d / "model.safetensors"), "remove the one that is stale"),
        ("broken", lambda d: (d / "model.safetensors.index.json").write_text("{\n!"), ":2: not JSON"),
        ("mapless", lambda d: (d / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
    ]
    for name, spoil, message in cases:
        write_sharded(tmp_path / name)
        spoil(tmp_path / name)
        with pytest.raises(ConversionError) as caught:
            SafetensorsReader(tmp_path / name)
        assert message in str(caught.value)
    (tmp_path / "old").mkdir()
    with pytest.raises(ConversionError, match="holds neither"):
        SafetensorsReader(tmp_path / "old")
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConversionError, match=r"\.bin weights only.*\n.*save_pretrained"):
        SafetensorsReader(tmp_path / "old")


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def test_files_are_byte_for_byte_those_of_safetensors(tmp_path: Path) -> None:
    dtypes = [torch.float16, torch.float64, torch.bfloat16, torch.float32]
    shapes = [(3, 5), (7,), (2, 2), (2, 3), (4, 2), (3,)]
    tensors = {f"ü.{9 - i}": torch.randn(shape).to(dtypes[i % 4]) for i, shape in enumerate(shapes)}
    layout = lay_out(specs_of(tensors))
    with new_files(tmp_path, layout):
        with BlockWriter(tmp_path, layout) as writer:
            for name, tensor in reversed(tensors.items()):
                middle = (len(tensor) + 1) // 2
                for start, rows in ((middle, tensor[middle:]), (0, tensor[:middle])):
                    if tensor.dim() == 1:
                        writer.write(name, rows, row=start)
                    else:
                        writer.write(name, rows[:, 1:], row=start, column=1)
                        writer.write(name, rows[:, :1], row=start)
            writer.flush()
        finish_files(tmp_path, layout)
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()


def test_written_files_split_and_transformers_reads(tmp_path: Path, models: dict[str, Path]) -> None:
    hf = read_all(models["llama"])
    for name, limit, files in (("one", 10**9, ["model.safetensors"]), ("many", 110_000, None)):
        out = write_safetensors(tmp_path / name, hf, max_shard_bytes=limit)
        write_side_files(read_side_files(models["llama"]), out, dtype=torch.float32)
        names = sorted(path.name for path in out.glob("*.safetensors"))
        assert not list(out.glob(".*"))
        assert files is None or names == files
        if files is None:
            assert names[0] == f"model-00001-of-{len(names):05d}.safetensors" and len(names) > 3
            assert all(sum(t.nbytes for t in load_file(out / n).values()) <= limit for n in names)
        state = AutoModelForCausalLM.from_pretrained(out).state_dict()
        assert all(torch.equal(state[tensor_name], tensor) for tensor_name, tensor in hf.items())
        with pytest.raises(ConversionError, match="already holds model"):
            write_safetensors(out, hf)


def make_files_and_fail(directory: Path, layout: FileLayout) -> None:
    with new_files(directory, layout):
        assert len(list(directory.rglob("*.safetensors"))) == 3
        raise KeyboardInterrupt


def test_killed_export_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    layout = lay_out(dict.fromkeys("abc", ((2,), torch.float32)), max_shard_bytes=8)
    with pytest.raises(KeyboardInterrupt):
        make_files_and_fail(tmp_path, layout)
    assert not list(tmp_path.iterdir())
    killed = new_files(tmp_path, layout)
    killed.__enter__()
    assert not list(tmp_path.glob("*.safetensors*"))
    write_safetensors(tmp_path, {"c": torch.ones(2)})
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_file_that_shrinks_while_it_is_read_is_told(tmp_path: Path) -> None:
    write_safetensors(tmp_path, {"a": torch.ones(4096)})
    with SafetensorsReader(tmp_path) as reader:
        os.truncate(tmp_path / "model.safetensors", 8192)
        with pytest.raises(ConversionError, match=r"model\.safetensors became shorter while it was read"):
            reader.read("a")
