"""What one rank does in tests of the keys that trade memory, time and rounding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

import megadpo.checkpoint.state
import megadpo.commands.train
import megadpo.optimizer.build
import megadpo.setup.options
import megadpo.train.train_step
import megadpo.train.trainer
from megadpo.checkpoint.saver import CheckpointSaver
from megadpo.data.batch import build_batch
from megadpo.data.tokenization import TokenizedPair
from megadpo.forward_step import sum_log_probs
from megadpo.models.builder import load_model
from megadpo.models.hf_config import read_architecture
from megadpo.models.options import ModelOptions, Recompute
from megadpo.optimizer.build import gather_weights, wrap_data_parallel
from megadpo.runtime.device import Device, megatron_device, select_device
from megadpo.runtime.parallel_state import build_parallel_state, distributed
from tests.helpers.host_memory import host_memory_apart
from tests.helpers.jobs.training import train
from tests.helpers.stand_ins.fused_adam_installed import fused_adam_installed

# Lengths of prompt, chosen and rejected.
_LENGTHS = ((60, 44, 90), (110, 30, 10), (80, 101, 2))


def kept_for_backward(model: str, modes: dict[str, Recompute]) -> dict[str, tuple[int, dict[str, np.ndarray]]]:
    """By mode: bytes of the tensors that the forward keeps beside the weights, and every weight's gradient."""
    device = select_device("cpu")
    results = {}
    with megatron_device(device), distributed(device, timeout_s=60):
        state = build_parallel_state(tensor=1, pipeline=1, virtual_pipeline=None, seed=0, timeout_s=60)
        arch = read_architecture(model)
        draw = np.random.default_rng(3)
        pairs = [
            TokenizedPair(index, *(draw.integers(arch.vocab_size, size=length) for length in lengths))
            for index, lengths in enumerate(_LENGTHS)
        ]
        batch = build_batch(pairs, num_tokens=sum(map(sum, _LENGTHS)), pad_token_id=0, share_prompt=True)
        for name, recompute in modes.items():
            options = ModelOptions(device=device, dtype=torch.float32, sequence_parallel=False, recompute=recompute)
            (chunk,) = wrap_data_parallel(load_model(arch, state, model, options))
            weights = {buffer.param_data.untyped_storage().data_ptr() for buffer in chunk.buffers}
            kept: dict[int, int] = {}

            def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor  # which stays alive until the backward: no address serves twice

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                output = chunk(batch.tokens_1T, batch.positions_T, batch.plan, batch.response_rows_N, batch.targets_N)
            held = sum(size for place, size in kept.items() if place not in weights)
            sums = sum_log_probs(batch, output)
            (sums.chosen_B - 0.7 * sums.rejected_B).sum().backward()
            results[name] = held, {name: weight.main_grad.numpy() for name, weight in chunk.named_parameters()}
    return results


@dataclass
class _Phase:
    name: str = "computing"


def train_watching_exchanges(overrides: list[str]) -> Counter[str]:
    """`train`; how often gradients were reduced and weights gathered, by what the program was doing then."""
    phase, counts = _Phase(), Counter[str]()
    group = param_and_grad_buffer._ParamAndGradBucketGroup

    def during(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            before, phase.name = phase.name, name
            try:
                return function(*args, **options)
            finally:
                phase.name = before

        return watched

    def counted(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            counts[f"{what} while {phase.name}"] += 1
            return function(*args, **options)

        return watched

    with ExitStack() as stack:
        for owner, name, watched in (
            (group, "start_grad_sync", counted("reduced", group.start_grad_sync)),
            (group, "start_param_sync", counted("gathered", group.start_param_sync)),
            (
                megadpo.train.train_step,
                "finalize_model_grads",
                during("finalizing", megadpo.train.train_step.finalize_model_grads),
            ),
            (DistributedOptimizer, "step", during("updating", DistributedOptimizer.step)),
            (
                DistributedOptimizer,
                "step_with_ready_grads",
                during("updating", DistributedOptimizer.step_with_ready_grads),
            ),
            (CheckpointSaver, "save", during("saving", CheckpointSaver.save)),
            (megadpo.train.trainer, "gather_weights", during("saving", gather_weights)),
            (megadpo.commands.train, "gather_weights", during("saving", gather_weights)),
        ):
            stack.enter_context(mock.patch.object(owner, name, watched))
        train(overrides)
    return counts


def train_pretending(what: str, overrides: list[str]) -> dict[str, Any]:
    """`train` with a stand-in for what only a GPU has: "fused_adam" or "host_memory"; how it was called, and bytes.

    The stand-in comes in where the program asks whether it is there, and leaves with the run.
    """
    problems = megadpo.setup.options.optimizer_problems
    seen: dict[str, Any] = {}
    with ExitStack() as stack:
        entered = {"fused_adam": fused_adam_installed, "host_memory": host_memory_apart}[what]

        def problems_on_cuda(config: Any, device: Device) -> list[str]:
            stack.enter_context(entered(seen))
            return problems(config, Device("cuda", device.torch_device))

        stack.enter_context(mock.patch.object(megadpo.setup.options, "optimizer_problems", problems_on_cuda))
        train(overrides)
    return seen
