"""Conversions stream: the checkpoint is the one that Megatron would write, no model is held, failures leave nothing."""

from __future__ import annotations

import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))  # as a benchmark has it

from bench.conversion import write_random_model

from tests.helpers.jobs.conversion import (
    differing_parameters,
    import_by_building_the_model,
    import_hf,
    import_hf_in_small_blocks,
    peaks_of_conversions,
    refusals,
)
from tests.helpers.jobs.training import compare_checkpoints
from tests.helpers.launch import launch
from tests.helpers.tiny_models import write_tiny_model

# Tensor and pipeline sizes on two ranks.
LAYOUTS = [{"tensor": 2, "pipeline": 1}, {"tensor": 1, "pipeline": 2}]


def tensor_descriptions(checkpoint: Path) -> dict[str, Any]:
    """(shape, properties) of each tensor; the checkpoint holds nothing else."""
    metadata: Any = pickle.loads((checkpoint / ".metadata").read_bytes())
    return {name: (entry.size, entry.properties) for name, entry in metadata.state_dict_metadata.items()}


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])  # tied with biases; with its own head and norms of heads
def test_an_import_is_the_checkpoint_that_megatron_writes(family: str, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", family, heads=8, kv_heads=4, head_dim=24, dtype=torch.bfloat16)
    built, streamed = tmp_path / "built", tmp_path / "streamed"
    launch(1, import_by_building_the_model, model, built)
    launch(3, import_hf_in_small_blocks, model, streamed)  # three ranks don't share four layers evenly
    assert len(list(streamed.glob("*.distcp"))) > 3
    ((names, different),) = launch(1, compare_checkpoints, str(built), str(streamed))
    assert "decoder.layers.self_attention.linear_qkv.layer_norm_weight" in names
    assert different == []
    assert tensor_descriptions(streamed) == tensor_descriptions(built)
    for name in ("common.pt", "metadata.json"):
        assert (streamed / name).read_bytes() == (built / name).read_bytes()
    assert launch(2, differing_parameters, model, streamed, LAYOUTS) == [[], []]


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    write_random_model(tmp_path / "small", layers=1, hidden=512, ffn=512, vocab=1024)
    write_random_model(tmp_path / "large", layers=56, hidden=512, ffn=1280, vocab=1024)
    size = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    largest = 2 * 2560 * 512  # bytes of gate and up projection of one layer
    (peaks,) = launch(1, peaks_of_conversions, tmp_path / "small", tmp_path / "large")
    for name, peak in peaks.items():
        # Beside the tensors: buffers of files, pages that the allocator keeps.
        assert peak <= 2.5 * largest + 2**26 < size / 3, name


def test_what_cannot_be_converted_leaves_nothing(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", "llama", tied=True)
    launch(1, import_hf, model, tmp_path / "whole")

    def changed(name: str, **changes: torch.Tensor | None) -> Path:
        directory = shutil.copytree(model, tmp_path / name)
        tensors: dict[str, torch.Tensor | None] = dict(load_file(model / "model.safetensors"))
        tensors |= {key.replace("__", "."): tensor for key, tensor in changes.items()}
        kept = {key: tensor for key, tensor in tensors.items() if tensor is not None}
        save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
        return directory

    weights = load_file(model / "model.safetensors")
    poison, head = torch.full((64,), float("nan")), weights["model.embed_tokens.weight"] + 1.0
    norm = "model__layers__3__input_layernorm__weight"
    last_norm = "model__norm__weight"
    torn = shutil.copytree(tmp_path / "whole", tmp_path / "torn")
    (torn / "__0_1.distcp").write_bytes(b"torn")
    renamed = shutil.copytree(tmp_path / "whole", tmp_path / "renamed")
    config = (renamed / "hf" / "config.json").read_text()
    (renamed / "hf" / "config.json").write_text(config.replace('"num_hidden_layers": 4', '"num_hidden_layers": 3'))
    cases = [
        ("import_hf", changed("nan", **{norm: poison, last_norm: -poison}), "holds NaN or infinite values"),
        ("import_hf", changed("head", lm_head__weight=head), "set tie_word_embeddings to false"),
        ("import_hf", changed("missing", **{norm: None}), "layers.3.input_layernorm.weight is missing"),
        ("import_hf", changed("quantized", **{norm: torch.zeros(64, dtype=torch.int8)}), "dequantize them first"),
        ("export_hf", torn, "torn is damaged"),
        ("export_hf", renamed, r"_norm_weight has shape [4, 64], the configuration asks for [3, 64]"),
    ]
    before = sorted(path.name for path in tmp_path.iterdir())
    first, second = launch(2, refusals, [(name, source, tmp_path / "out") for name, source, _ in cases])
    assert first == second
    for said, (*_, expected) in zip(first, cases, strict=True):
        assert expected in said
    assert "model.layers.3.input_layernorm.weight holds" in first[0] and "model.norm.weight holds" in first[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == before
