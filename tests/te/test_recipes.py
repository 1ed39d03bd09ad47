"""Megatron's FP8 settings become the recipes of Transformer Engine that they name."""

from __future__ import annotations

from typing import Any

import pytest

COMMON = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "use_cpu_initialization": True, "bf16": True}


def recipe_of(**settings: Any) -> Any:
    """What Megatron makes of a configuration with these settings."""
    from megatron.core.fp8_utils import get_fp8_recipe
    from megatron.core.transformer.transformer_config import TransformerConfig

    return get_fp8_recipe(TransformerConfig(**COMMON, **settings))


@pytest.mark.parametrize("fp8_format", ["hybrid", "e4m3"])
@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("tensorwise", "Float8CurrentScaling"),
        ("delayed", "DelayedScaling"),
        ("blockwise", "Float8BlockScaling"),
        ("mxfp8", "MXFP8BlockScaling"),
    ],
)
def test_recipe_and_format(recipe: str, name: str, fp8_format: str) -> None:
    """FP8 stays out of attention in every one."""
    from transformer_engine.common import recipe as recipes

    made = recipe_of(fp8=fp8_format, fp8_recipe=recipe)
    assert isinstance(made, getattr(recipes, name))
    assert made.fp8_format is recipes.Format[fp8_format.upper()]
    assert not made.fp8_dpa
    assert not made.fp8_mha


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
def test_history_of_delayed_scaling(algorithm: str) -> None:
    made = recipe_of(fp8="hybrid", fp8_recipe="delayed", fp8_amax_history_len=16, fp8_amax_compute_algo=algorithm)
    assert (made.amax_history_len, made.amax_compute_algo) == (16, algorithm)


def test_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match="only supported FP8 recipes"):
        recipe_of(fp8="hybrid", fp8_recipe="nope")
    with pytest.raises(ValueError, match="only supported FP8 formats"):
        recipe_of(fp8="e5m2", fp8_recipe="tensorwise")
