"""What ranks do with the stand-in for Transformer Engine; their interpreters must have been started with STAND_IN."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

from megadpo.checkpoint.description import TRAINED
from megadpo.checkpoint.manifest import write_manifest
from megadpo.checkpoint.state import load_checkpoint, load_reference, load_weights, model_state
from megadpo.checkpoint.writer import METADATA
from megadpo.data.loader import BatchBuilder
from megadpo.errors import ConfigError
from megadpo.forward_step import score
from megadpo.models.builder import build_model, load_model
from megadpo.models.fp8 import Fp8
from megadpo.models.hf_config import read_architecture
from megadpo.models.options import ModelOptions
from megadpo.models.policy import PolicyModel
from megadpo.models.quantised import count_quantised, without_fp8
from megadpo.optimizer.build import build_optimizer, distributed_optimizers, wrap_data_parallel
from megadpo.runtime.device import megatron_device, select_device
from megadpo.runtime.parallel_state import build_parallel_state, distributed
from megadpo.setup.datasets import batch_shape
from tests.helpers.hostile import Program
from tests.helpers.jobs.fault import MeetingPlaces, Outcome, Start, captured_log, start_each
from tests.helpers.jobs.training import score_and_export
from tests.helpers.tokenized import tokenized_pairs

STAND_IN = Path(__file__).parents[1] / "stand_ins" / "te"
KERNELS = {"backend": "transformer_engine", "attention": "transformer_engine"}


@contextmanager
def served_on_cpu() -> Iterator[None]:
    """Takes away, for the stand-in alone, the checks that keep Transformer Engine and its Adam from a CPU."""
    with ExitStack() as stack:
        for name, answer in {
            "megadpo.runtime.device._check_torch_optimizer": None,
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
class Delayed:
    """What models in delayed FP8 take from checkpoints, and leave there."""

    kept: list[str]
    """entries of their own state besides weights and biases"""
    ran: dict[str, bool]
    """whether a program in place of a history has run, by what loaded the checkpoint"""
    log: list[str]
    """lines said meanwhile"""


@dataclass(frozen=True)
class Served:
    """What one rank saw of Transformer Engine's layers."""

    outcomes: dict[str, Outcome]
    """of the starts"""
    scores: dict[str, dict[int, tuple[float, float]]]
    """what `score_and_export` tells"""
    attention_calls: list[list[int]]
    """queries, keys and sequences of each call while scoring"""
    delayed: Delayed
    """models in delayed scaling, on each rank alone"""
    fp8: Fp8Passes
    """on each rank alone"""


def start_and_score(
    starts: Sequence[Start], models: list[str], data: str, layout: dict[str, Any], checkpoint: Path
) -> Served:
    """The starts, log-probs and exports of all models, and the last model filled from the checkpoint."""
    places = MeetingPlaces()
    with served_on_cpu():
        delayed = _fill_delayed(models[-1], checkpoint)
        fp8 = _fp8_passes(models[-1], data)
        outcomes = start_each(starts, places)
        places.move("scores")
        with _counted_attention() as calls:
            scores = score_and_export(models, data, layout, kernels=KERNELS)
    return Served(outcomes, scores, calls, delayed, fp8)


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
            scores = score(chunks, builder.build(pairs), torch_device=device.torch_device)
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


def _fill_delayed(model: str, checkpoint: Path) -> Delayed:
    """Loads a checkpoint whose histories are programs into a model in delayed FP8 in every way, on each rank alone."""
    device = select_device("cpu")
    alone = {name: value for name, value in os.environ.items() if name != "RANK"}
    with (
        tempfile.TemporaryDirectory() as directory,
        mock.patch.dict(os.environ, alone, clear=True),
        megatron_device(device),
        distributed(device, timeout_s=60),
        captured_log() as log,
    ):
        root = Path(directory)
        state = build_parallel_state(tensor=1, pipeline=1, virtual_pipeline=None, seed=0, timeout_s=60)
        arch = read_architecture(model)
        options = ModelOptions(device=device, dtype=torch.float32, sequence_parallel=False, **KERNELS)
        (chunk,) = build_model(arch, state, options)
        chunk.config.fp8, chunk.config.fp8_recipe = "hybrid", "delayed"
        load_weights(checkpoint, [chunk], vocab_size=arch.vocab_size)
        assert all(parameter.isfinite().all() for parameter in chunk.parameters())
        wrapped = wrap_data_parallel([chunk])
        optimizer = build_optimizer(
            wrapped, dtype=torch.float32, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, clip_grad=1.0
        )
        for member in distributed_optimizers(optimizer):
            member.init_state_fn(member.optimizer, member.config)
            for group in member.optimizer.param_groups:
                group["step"] = 0
        content = {
            **_with_programs("", chunk, root / "mark"),
            **_with_programs("reference.", chunk, root / "mark"),
            "optimizer": optimizer.sharded_state_dict(model_state([chunk]), metadata=dict(METADATA)),
        }
        hostile = root / "hostile"
        hostile.mkdir()
        dist_checkpointing.save(content, str(hostile), content_metadata=dict(METADATA))
        shutil.copy(checkpoint / TRAINED, hostile)
        write_manifest(hostile, {})
        ran = {}
        for name, load in {
            "weights": lambda: load_weights(hostile, [chunk], vocab_size=arch.vocab_size),
            "reference": lambda: load_reference(hostile, [chunk]),
            "checkpoint": lambda: load_checkpoint(hostile, wrapped, optimizer),
            "what Transformer Engine does by itself": lambda: chunk.load_state_dict(
                {"decoder.layers.0.mlp.linear_fc1._extra_state": _program(root / "mark")}, strict=False
            ),
        }.items():
            load()
            ran[name] = (root / "mark").exists()
        kept = [name for name in model_state([chunk])["model0"] if not name.endswith(("weight", "bias"))]
        parallel_state.destroy_model_parallel()
    return Delayed(kept, ran, log)


def _program(mark: Path) -> torch.Tensor:
    """A history of Transformer Engine's format that makes a directory."""
    return torch.frombuffer(bytearray(pickle.dumps(Program(mark))), dtype=torch.uint8)


def _with_programs(prefix: str, chunk: PolicyModel, mark: Path) -> dict[str, Any]:
    """The chunk's whole sharded state, each history of which is a program."""
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    with mock.patch.object(TransformerEngineBaseModule, "get_extra_state", return_value=_program(mark)):
        state = {f"{prefix}model": chunk.sharded_state_dict(metadata=dict(METADATA))}
    add_prefix_for_sharding(state, prefix)
    return state
