"""What the ranks of a distributed test do; module-level functions that `launch` can send."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import torch
from megatron.core import dist_checkpointing

import megadpo.setup.models
import megadpo.train.trainer
from megadpo.commands.train import run_training
from megadpo.config.choices import ReferenceMode
from megadpo.config.compose import compose_config
from megadpo.config.validation import validate
from megadpo.data.loader import BatchBuilder, GlobalBatch
from megadpo.data.tokenization import load_tokenizer
from megadpo.forward_step import score
from megadpo.loss.preference import SequenceLogProbs
from megadpo.models.builder import load_model
from megadpo.models.conversion.load_save import export_hf_weights
from megadpo.models.hf_config import read_architecture
from megadpo.models.options import ModelOptions
from megadpo.reference import ResidentReference
from megadpo.runtime.device import megatron_device, select_device
from megadpo.runtime.parallel_state import build_parallel_state, distributed
from megadpo.setup.datasets import batch_shape
from megadpo.train.train_step import RankVotes, StepResult, train_step
from megadpo.train.trainer import Trainer
from tests.helpers.host_reads import HostReads
from tests.helpers.tokenized import tokenized_pairs


def train(overrides: list[str]) -> str:
    """Runs a training with the overrides on this rank; the run directory."""
    config = compose_config(overrides)
    validate(config, world_size=int(os.environ["WORLD_SIZE"]))
    return str(run_training(config))


def train_while_a_directory_vanishes(overrides: list[str], directory: Path) -> str:
    """`train`, with a directory that is removed before the first update."""

    def update(*args: Any, **options: Any) -> StepResult:
        shutil.rmtree(directory, ignore_errors=True)
        return train_step(*args, **options)

    with mock.patch.object(megadpo.train.trainer, "train_step", update):
        return train(overrides)


def host_reads_of_a_step(overrides: list[str], silent_step: int) -> tuple[list[str], list[str]]:
    """`train`; the places that read tensors on the host in a step that does not log, and when the next line is due."""
    silent, logged = HostReads(), HostReads()
    make_step, log_steps = Trainer._step, Trainer._log_steps

    def watched_step(self: Trainer, step: int, *args: Any) -> RankVotes:
        with silent if step == silent_step else nullcontext():
            return make_step(self, step, *args)

    def watched_log(self: Trainer, *args: Any) -> None:
        with logged:
            log_steps(self, *args)

    with (
        mock.patch.object(Trainer, "_step", watched_step),
        mock.patch.object(Trainer, "_log_steps", watched_log),
    ):
        train(overrides)
    return silent.files, logged.files


def train_in_environment(overrides: list[str], environment: dict[str, str]) -> str:
    """`train`, with further environment variables."""
    os.environ.update(environment)
    return train(overrides)


def score_and_export(
    models: list[str],
    data: str,
    layout: dict[str, Any],
    *,
    budget: int = 400,
    share_prompt: bool = True,
    dtype: torch.dtype = torch.float32,
    max_length: int = 512,
    device_kind: str = "cpu",
    kernels: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, dict[int, tuple[float, float]]]:
    """Log-probs of every pair of `data` under every model directory, and each model's export to DIR-export.

    The result is {model: {pair index: (chosen, rejected)}} on ranks of the last stage, with nothing in it elsewhere.
    `kernels` are the fields of ModelOptions that say what computes.
    """
    device = select_device(device_kind)
    with megatron_device(device), distributed(device, timeout_s=120):
        state = build_parallel_state(
            tensor=layout.get("tensor", 1),
            pipeline=layout.get("pipeline", 1),
            virtual_pipeline=layout.get("virtual_pipeline"),
            seed=0,
            timeout_s=120,
        )
        results: dict[str, dict[int, tuple[float, float]]] = {}
        for model in models:
            arch = read_architecture(model)
            options = ModelOptions(device=device, dtype=dtype, sequence_parallel=state.tensor_size > 1, **kernels)
            chunks = load_model(arch, state, model, options)
            tokenizer = load_tokenizer(model)
            pairs = tokenized_pairs(data, model, max_length=max_length)
            builder = BatchBuilder(
                shape=batch_shape(state, sequence_parallel=state.tensor_size > 1),
                tokens_per_microbatch=budget,
                pad_token_id=int(tokenizer.pad_token_id),
                share_prompt=share_prompt,
                flop_rates=arch.flop_rates,
            )
            batch = builder.build(pairs)
            results[model] = {}
            scores = score(chunks, batch, torch_device=device.torch_device)
            for microbatch, logps in zip(batch.microbatches, scores, strict=False):
                columns = (microbatch.pair_indices, logps.chosen_B.tolist(), logps.rejected_B.tolist())
                for index, chosen, rejected in zip(*columns, strict=True):
                    results[model][index] = (chosen, rejected)
            layout_name = "-".join(f"{k}{v}" for k, v in layout.items())
            export_hf_weights(chunks, arch, f"{model}-export-{layout_name}", state=state)
        return results


def compare_checkpoints(a: str, b: str) -> tuple[list[str], list[str]]:
    """(names of all tensors of checkpoint `a`: weights, fp32 main weights, moments; those that differ in `b`)."""
    device = select_device("cpu")
    with megatron_device(device), distributed(device, timeout_s=60):
        build_parallel_state(tensor=1, pipeline=1, virtual_pipeline=None, seed=0, timeout_s=60)
        first, second = (dist_checkpointing.load_plain_tensors(directory) for directory in (a, b))
        different = [name for name in first if name not in second or not _equal(first[name], second[name])]
        return sorted(first), sorted(set(second) - set(first)) + different


def main_weights_apart(pairs: list[tuple[str, str]]) -> list[float]:
    """For each pair of checkpoints: the largest difference of their fp32 main weights, over the largest of them."""
    device, result = select_device("cpu"), []
    with megatron_device(device), distributed(device, timeout_s=60):
        build_parallel_state(tensor=1, pipeline=1, virtual_pipeline=None, seed=0, timeout_s=60)
        for pair in pairs:
            first, second = (dist_checkpointing.load_plain_tensors(directory) for directory in pair)
            names = [name for name in first if name.startswith("optimizer.state.param.")]
            largest = max(float(first[name].abs().max()) for name in names)
            result.append(max(float((first[name] - second[name]).abs().max()) for name in names) / largest)
    return result


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


class _SkewedReference(ResidentReference):
    """A reference that differs from an equal policy by a ten-thousandth of a nat on each chosen response."""

    def log_probs(self, batch: GlobalBatch) -> list[SequenceLogProbs]:
        return [replace(logps, chosen_B=logps.chosen_B + 1e-4) for logps in super().log_probs(batch)]


def train_with_a_skewed_reference(overrides: list[str]) -> str:
    """`train`, with a reference that is not quite the starting policy although it should be."""
    with mock.patch.dict(megadpo.setup.models._REFERENCES, {ReferenceMode.resident: _SkewedReference}):
        return train(overrides)


def export_with_ranks_apart(model: str, out_dir: str) -> None:
    """Exports at tp2 after the final norm of tensor rank 1 has drifted from rank 0's."""
    device = select_device("cpu")
    with megatron_device(device), distributed(device, timeout_s=60):
        state = build_parallel_state(tensor=2, pipeline=1, virtual_pipeline=None, seed=0, timeout_s=60)
        arch = read_architecture(model)
        options = ModelOptions(device=device, dtype=torch.float32, sequence_parallel=True)
        chunks = load_model(arch, state, model, options)
        with torch.no_grad():
            chunks[0].decoder.final_layernorm.weight.add_(1e-3 * state.tensor_rank)
        export_hf_weights(chunks, arch, out_dir, state=state)
