"""These tests need a CUDA device; without one all are skipped with that reason."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _on_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: torch sees none")
