"""Each model family against transformers: per-pair log-probs in four layouts, and a bit-equal way back."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.jobs.training import score_and_export
from tests.helpers.launch import launch
from tests.helpers.naive import pair_logps
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import write_jsonl
from tests.helpers.tiny_models import write_tiny_model
from tests.helpers.tokenized import tokenized_pairs

# name: arguments of write_tiny_model. Together: GQA, one head per group, qkv bias, qk-norm, tied and untied embeddings,
# head_dim other than hidden/heads, vocabularies that no tensor-parallel size divides and one that needs no padding,
# every rope type.
VARIANTS = {
    "llama": {"family": "llama"},
    "llama_tied_wide_heads": {"family": "llama", "tied": True, "head_dim": 32, "vocab_size": 389},
    "llama_scaled_rope": {
        "family": "llama",
        "rope": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama_yarn": {
        "family": "llama",
        "rope": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    # As Llama 2: a group for each head.
    "llama_mha_linear_rope": {
        "family": "llama",
        "kv_heads": 4,
        "vocab_size": 512,
        "rope": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
    "mistral": {"family": "mistral", "head_dim": 32},
    "qwen2_tied": {"family": "qwen2", "tied": True, "vocab_size": 523},
    "qwen2_untied_mha": {"family": "qwen2", "tied": False, "kv_heads": 4},
    "qwen3": {"family": "qwen3", "head_dim": 32},
    "qwen3_tied": {"family": "qwen3", "tied": True, "head_dim": 32},
}
LAYOUTS = ({"tensor": 2}, {"pipeline": 2}, {"tensor": 4}, {"tensor": 2, "pipeline": 2})

# Here every pair is two sequences; elsewhere its prompt is computed once.
WITH_PROMPTS_TWICE = ({"pipeline": 2}, {"tensor": 4})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: write_tiny_model(root / name, **arguments) for name, arguments in VARIANTS.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", make_pairs(12, seed=3))


@pytest.fixture(scope="module")
def expected(models: dict[str, Path], data: Path) -> dict[str, dict[int, tuple[float, float]]]:
    """Log-probs of each pair by transformers under each model."""
    return {
        name: pair_logps(directory, tokenized_pairs(data, directory, max_length=512))
        for name, directory in models.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(f"{k}{v}" for k, v in layout.items()))
def test_scores_equal_transformers_and_export_is_bit_equal(
    layout: dict[str, int],
    models: dict[str, Path],
    data: Path,
    expected: dict[str, dict[int, tuple[float, float]]],
) -> None:
    world = layout.get("tensor", 1) * layout.get("pipeline", 1)
    job = partial(score_and_export, share_prompt=layout not in WITH_PROMPTS_TWICE)
    results = launch(world, job, [str(m) for m in models.values()], str(data), layout)
    for name, directory in models.items():
        scored = results[-1][str(directory)]
        assert scored.keys() == expected[name].keys(), name
        for index, logps in expected[name].items():
            assert scored[index] == pytest.approx(logps, rel=1e-4), f"{name}, pair {index}"

        exported = Path(f"{directory}-export-" + "-".join(f"{k}{v}" for k, v in layout.items()))
        before, after = load_file(directory / "model.safetensors"), load_file(exported / "model.safetensors")
        assert before.keys() == after.keys(), name
        for weight, tensor in before.items():
            assert tensor.dtype == after[weight].dtype
            assert torch.equal(tensor, after[weight]), f"{name}: {weight}"
