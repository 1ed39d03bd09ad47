"""The stand-in that other tests use has the signatures and names of the Transformer Engine that is installed."""

from __future__ import annotations

import inspect
import sys
from dataclasses import fields
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

PACKAGE = Path(__file__).parents[1] / "helpers" / "stand_ins" / "te" / "transformer_engine"
CALLABLES = [
    "pytorch.Linear.__init__",
    "pytorch.Linear.forward",
    "pytorch.LayerNormLinear.__init__",
    "pytorch.LayerNormLinear.forward",
    "pytorch.RMSNorm.__init__",
    "pytorch.DotProductAttention.__init__",
    "pytorch.DotProductAttention.forward",
    "pytorch.ops.SwiGLU.__init__",
    "pytorch.optimizers.FusedAdam.__init__",
    "pytorch.optimizers.FusedAdam.step",
    "pytorch.fp8.fp8_autocast",
    "pytorch.distributed.activation_recompute_forward",
    "pytorch.module.base.get_dummy_wgrad",
    "pytorch.get_cudnn_version",
]
RECIPES = ["DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling"]


@pytest.fixture(scope="module")
def stand_in() -> ModuleType:
    """The package under a name of its own, beside the real one."""
    spec = spec_from_file_location("te_stand_in", PACKAGE / "__init__.py", submodule_search_locations=[str(PACKAGE)])
    package = module_from_spec(spec)
    sys.modules["te_stand_in"] = package
    spec.loader.exec_module(package)
    return package


def found(package: str, dotted: str) -> object:
    """What a dotted name means, below a package."""
    parts = dotted.split(".")
    for cut in range(len(parts), -1, -1):
        try:
            thing: object = import_module(".".join([package, *parts[:cut]]))
        except ImportError:
            continue
        for part in parts[cut:]:
            thing = vars(thing)[part] if isinstance(thing, ModuleType) else getattr(thing, part)
        return thing
    raise AssertionError(dotted)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("name", CALLABLES)
def test_signatures_are_the_real_ones(name: str) -> None:
    """Names, kinds, order and defaults of all parameters."""
    mine, real = (
        [(p.name, p.kind, p.default) for p in inspect.signature(found(package, name)).parameters.values()]
        for package in ("te_stand_in", "transformer_engine")
    )
    assert mine == real


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_have_the_real_fields(name: str) -> None:
    described = []
    for package in ("te_stand_in", "transformer_engine"):
        recipe = found(package, f"common.recipe.{name}")
        described.append({field.name: str(getattr(recipe(), field.name)) for field in fields(recipe)})
    assert described[0] == described[1]


def test_versions_agree(stand_in: ModuleType) -> None:
    import transformer_engine

    assert stand_in.__version__.split(".")[:2] == transformer_engine.__version__.split(".")[:2]
