"""What ranks do with the stand-in for Transformer Engine; their interpreters must have been started with STAND_IN."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state

from megadpo.checkpoint import _model_state, load_weights
from megadpo.device import megatron_device, select_device
from megadpo.models.builder import build_model
from megadpo.models.hf_config import read_architecture
from megadpo.models.options import ModelOptions
from megadpo.parallel.state import build_parallel_state, distributed
from tests.helpers.fault_jobs import MeetingPlaces, Outcome, Start, captured_log, start_each
from tests.helpers.jobs import score_and_export

STAND_IN = Path(__file__).parent / "te_stand_in"
KERNELS = {"backend": "transformer_engine", "attention": "transformer_engine"}


@contextmanager
def served_on_cpu() -> Iterator[None]:
    """Takes away, for the stand-in alone, the checks that keep Transformer Engine and its Adam from a CPU."""
    with ExitStack() as stack:
        for name, answer in {
            "megadpo.device._check_torch_optimizer": None,
            "megadpo.models.backend.why_not_transformer_engine": None,
            "megadpo.models.kernels.why_not_te_attention": None,
            "megadpo.config.validation._check_device": [],
        }.items():
            stack.enter_context(mock.patch(name, return_value=answer))
        yield


@dataclass(frozen=True)
class Served:
    """What one rank saw of Transformer Engine's layers."""

    outcomes: dict[str, Outcome]
    """of the starts"""
    scores: dict[str, dict[int, tuple[float, float]]]
    """what `score_and_export` tells"""
    attention_calls: list[list[int]]
    """queries, keys and sequences of each call while scoring"""
    histories: list[str]
    """entries of a checkpoint of delayed scaling besides weights"""
    filling_log: list[str]
    """lines said when such a model was filled from a checkpoint without them"""


def start_and_score(
    starts: Sequence[Start], models: list[str], data: str, layout: dict[str, Any], checkpoint: Path
) -> Served:
    """The starts, log-probs and exports of all models, and the last model filled from the checkpoint."""
    places = MeetingPlaces()
    with served_on_cpu():
        histories, log = _fill_delayed(models[-1], checkpoint)
        outcomes = start_each(starts, places)
        places.move("scores")
        with _counted_attention() as calls:
            scores = score_and_export(models, data, layout, kernels=KERNELS)
    return Served(outcomes, scores, calls, histories, log)


@contextmanager
def _counted_attention() -> Iterator[list[list[int]]]:
    import transformer_engine.pytorch as te

    calls: list[list[int]] = []
    attend = te.DotProductAttention.forward

    def counted(self: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        calls.append([len(query), len(key), len(options["cu_seqlens_q"]) - 1])
        return attend(self, query, key, *args, **options)

    with mock.patch.object(te.DotProductAttention, "forward", counted):
        yield calls


def _fill_delayed(model: str, checkpoint: Path) -> tuple[list[str], list[str]]:
    """Loads a checkpoint's weights into a model in delayed FP8, on each rank alone."""
    device = select_device("cpu")
    alone = {name: value for name, value in os.environ.items() if name != "RANK"}
    with (
        mock.patch.dict(os.environ, alone, clear=True),
        megatron_device(device),
        distributed(device, timeout_s=60),
        captured_log() as log,
    ):
        state = build_parallel_state(tensor=1, pipeline=1, virtual_pipeline=None, seed=0, timeout_s=60)
        arch = read_architecture(model)
        options = ModelOptions(device=device, dtype=torch.float32, sequence_parallel=False, **KERNELS)
        (chunk,) = build_model(arch, state, options)
        chunk.config.fp8, chunk.config.fp8_recipe = "hybrid", "delayed"
        load_weights(checkpoint, [chunk], vocab_size=arch.vocab_size)
        assert all(parameter.isfinite().all() for parameter in chunk.parameters())
        names = {entry.key for entry in _model_state([chunk])["model0"].values()}
        parallel_state.destroy_model_parallel()
    return sorted(name for name in names if name.endswith("_extra_state")), log
