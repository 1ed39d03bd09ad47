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

from megadpo.assembly import batch_shape
from megadpo.checkpoint import _model_state, load_weights
from megadpo.data.loader import BatchBuilder
from megadpo.device import megatron_device, select_device
from megadpo.errors import ConfigError
from megadpo.forward_step import score
from megadpo.models.builder import build_model, load_model
from megadpo.models.fp8 import Fp8
from megadpo.models.hf_config import read_architecture
from megadpo.models.options import ModelOptions
from megadpo.models.quantised import count_quantised, without_fp8
from megadpo.parallel.state import build_parallel_state, distributed
from tests.helpers.fault_jobs import MeetingPlaces, Outcome, Start, captured_log, start_each
from tests.helpers.jobs import score_and_export
from tests.helpers.tokenized import tokenized_pairs

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
class Fp8Passes:
    """What a model that was built with FP8 computes."""

    counted: tuple[int, int]
    """by `count_quantised`"""
    layers: dict[str, list[int]]
    """layers whose linears had FP8's context, by how the pass was made"""
    logps: dict[str, list[float]]
    """of the first pairs' chosen responses"""
    refused: str
    """what `count_quantised` says when Megatron's configuration has lost the setting"""


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
    fp8: Fp8Passes
    """on each rank alone"""


def start_and_score(
    starts: Sequence[Start], models: list[str], data: str, layout: dict[str, Any], checkpoint: Path
) -> Served:
    """The starts, log-probs and exports of all models, and the last model filled from the checkpoint."""
    places = MeetingPlaces()
    with served_on_cpu():
        histories, log = _fill_delayed(models[-1], checkpoint)
        fp8 = _fp8_passes(models[-1], data)
        outcomes = start_each(starts, places)
        places.move("scores")
        with _counted_attention() as calls:
            scores = score_and_export(models, data, layout, kernels=KERNELS)
    return Served(outcomes, scores, calls, histories, log, fp8)


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


def _fp8_passes(model: str, data: str) -> Fp8Passes:
    """A model of two layers, the first of which stays out of FP8, on each rank alone."""
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    device = select_device("cpu")
    fp8 = Fp8(recipe="tensorwise", format="hybrid", emulated=False, num_layers_at_start_in_bf16=1)
    layers: dict[str, list[int]] = {}
    logps: dict[str, list[float]] = {}
    alone = {name: value for name, value in os.environ.items() if name != "RANK"}
    with mock.patch.dict(os.environ, alone, clear=True), megatron_device(device), distributed(device, timeout_s=60):
        state = build_parallel_state(tensor=1, pipeline=1, virtual_pipeline=None, seed=0, timeout_s=60)
        arch = read_architecture(model)
        options = ModelOptions(device=device, dtype=torch.float32, sequence_parallel=False, fp8=fp8, **KERNELS)
        chunks = load_model(arch, state, model, options)
        builder = BatchBuilder(
            shape=batch_shape(state, sequence_parallel=False, fp8_recipe="tensorwise"),
            tokens_per_microbatch=640,
            pad_token_id=0,
            share_prompt=True,
            flop_rates=arch.flop_rates,
            reference_flop_rates=arch.flop_rates,
        )
        pairs = tokenized_pairs(data, model, max_length=512)[:3]

        def run(name: str) -> None:
            seen = layers.setdefault(name, [])
            for number, layer in enumerate(chunks[0].decoder.layers):
                layer.mlp.linear_fc2.register_forward_hook(
                    lambda *_, number=number: seen.append(number) if FP8GlobalStateManager.is_fp8_enabled() else None
                )
            scores = score(chunks, builder.build(pairs), device=device.torch_device)
            logps[name] = [value for microbatch in scores for value in microbatch.chosen_B.tolist()]
            for layer in chunks[0].decoder.layers:
                layer.mlp.linear_fc2._forward_hooks.clear()

        run("with")
        with without_fp8(chunks):
            run("without")
        run("with again")
        counted = count_quantised(chunks, fp8)
        chunks[0].config.fp8 = None
        try:
            refused = str(count_quantised(chunks, fp8))
        except ConfigError as error:
            refused = str(error)
        parallel_state.destroy_model_parallel()
    return Fp8Passes(counted, {name: sorted(set(seen)) for name, seen in layers.items()}, logps, refused)


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
