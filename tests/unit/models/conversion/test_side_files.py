"""The files beside the weights travel byte for byte, the dtype of config.json aside, and what differs is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from megadpo.errors import ConversionError
from megadpo.models.conversion.side_files import different_side_files, read_side_files, write_side_files
from tests.helpers.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a second chat template."""
    directory = write_tiny_model(tmp_path_factory.mktemp("side") / "model", "llama")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    return directory


def test_side_files_are_copied_byte_for_byte(tmp_path: Path, model: Path) -> None:
    write_side_files(read_side_files(model), tmp_path / "same", dtype=torch.float32)
    names = {str(path.relative_to(tmp_path / "same")) for path in (tmp_path / "same").rglob("*") if path.is_file()}
    assert names == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        "additional_chat_templates/tools.jinja",
    }
    for name in names:
        assert (tmp_path / "same" / name).read_bytes() == (model / name).read_bytes()
    write_side_files(read_side_files(model), tmp_path / "other", dtype=torch.bfloat16)
    original, changed = ((d / "config.json").read_text() for d in (model, tmp_path / "other"))
    assert changed == original.replace('"dtype": "float32"', '"dtype": "bfloat16"') != original


def test_a_place_that_cannot_be_read_or_written_is_named(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ConversionError, match=r"config\.json does not exist; name the directory"):
        read_side_files(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConversionError, match=r"file/hf: can't be written \(Not a directory\): make room, or choose"):
        write_side_files(read_side_files(model), tmp_path / "file" / "hf", dtype=torch.float32)


def test_what_differs_is_named_and_the_dtype_does_not_count(tmp_path: Path, model: Path) -> None:
    files = read_side_files(model)
    write_side_files(files, tmp_path / "rounded", dtype=torch.bfloat16)
    assert different_side_files(files, read_side_files(tmp_path / "rounded")) == {}

    other = shutil.copytree(model, tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ other }}")
    (other / "tokenizer_config.json").unlink()
    (other / "added_tokens.json").write_text("{}")
    fields = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**fields, "use_cache": 1, "bos_token_id": None, "dtype": "float16"}))
    size = len(files["chat_template.jinja"])
    assert different_side_files(files, read_side_files(other)) == {
        "added_tokens.json": "only in the checkpoint",
        "chat_template.jinja": f"contents differ ({size} and 11 bytes)",
        "config.json": "fields differ: bos_token_id, use_cache",
        "tokenizer_config.json": "not in the checkpoint",
    }
