"""Our FP8 settings become the recipes of Transformer Engine that they name, through Megatron."""

from __future__ import annotations

from typing import Any

import pytest

from megadpo.models.fp8 import Fp8
from megadpo.models.fp8_recipes import default_format

COMMON = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "use_cpu_initialization": True, "bf16": True}


def recipe_of(**settings: Any) -> Any:
    """What Megatron makes of a configuration with these settings."""
    from megatron.core.fp8_utils import get_fp8_recipe
    from megatron.core.transformer.transformer_config import TransformerConfig

    return get_fp8_recipe(TransformerConfig(**COMMON, **settings))


def ours(recipe: str, number_format: str | None = None, **settings: Any) -> Any:
    """What becomes of our settings."""
    fp8 = Fp8(recipe=recipe, format=number_format or default_format(recipe), emulated=False, **settings)
    return recipe_of(**fp8.megatron_fields())


@pytest.mark.parametrize("number_format", [None, "hybrid", "e4m3"])
@pytest.mark.parametrize(
    ("recipe", "name", "default"),
    [
        ("tensorwise", "Float8CurrentScaling", "HYBRID"),
        ("delayed", "DelayedScaling", "HYBRID"),
        ("blockwise", "Float8BlockScaling", "E4M3"),
        ("mxfp8", "MXFP8BlockScaling", "E4M3"),
    ],
)
def test_recipe_and_format(recipe: str, name: str, default: str, number_format: str | None) -> None:
    """FP8 stays out of attention in every one."""
    from transformer_engine.common import recipe as recipes

    made = ours(recipe, number_format)
    assert isinstance(made, getattr(recipes, name))
    assert made.fp8_format is recipes.Format[(number_format or default).upper()]
    assert not made.fp8_dpa
    assert not made.fp8_mha


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
def test_history_of_delayed_scaling(algorithm: str) -> None:
    made = ours("delayed", amax_history_len=16, amax_compute_algo=algorithm)
    assert (made.amax_history_len, made.amax_compute_algo) == (16, algorithm)


def test_outer_layers_may_stay_in_bf16() -> None:
    from megatron.core.fp8_utils import is_first_last_bf16_layer
    from megatron.core.transformer.transformer_config import TransformerConfig

    fp8 = Fp8(recipe="tensorwise", format="hybrid", emulated=False, num_layers_at_start_in_bf16=1)
    config = TransformerConfig(**{**COMMON, "num_layers": 3}, **fp8.megatron_fields())
    assert [is_first_last_bf16_layer(config, layer) for layer in range(3)] == [
        not fp8.covers(layer, 3) for layer in range(3)
    ]


def test_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match="only supported FP8 recipes"):
        recipe_of(fp8="hybrid", fp8_recipe="nope")
    with pytest.raises(ValueError, match="only supported FP8 formats"):
        recipe_of(fp8="e5m2", fp8_recipe="tensorwise")
