"""These tests look at the real Transformer Engine, which the usual environment does not have; `make test-te` runs them.

They need no GPU: signatures and recipes are there without one.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec

import pytest


@pytest.fixture(scope="session", autouse=True)
def _installed() -> None:
    if find_spec("transformer_engine") is None:
        pytest.skip("Transformer Engine is not installed: make test-te makes an environment that has it")
    importlib.import_module("transformer_engine.pytorch")
