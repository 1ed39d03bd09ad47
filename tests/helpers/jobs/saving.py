"""A rank that saves checkpoint after checkpoint until it is killed; what is in each is a function of its step."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megadpo.checkpoint import writer as checkpoint_writer
from megadpo.checkpoint.description import Progress
from megadpo.checkpoint.directory import Retention, list_checkpoints, step_directories, step_of
from megadpo.checkpoint.saver import CheckpointSaver
from megadpo.checkpoint.state import damage_of, load_checkpoint
from megadpo.health.watchdog import HangWatchdog
from megadpo.models.builder import build_model
from megadpo.models.hf_config import parse_architecture
from megadpo.models.options import ModelOptions
from megadpo.optimizer.build import Policy, build_optimizer, distributed_optimizers, wrap_data_parallel
from megadpo.runtime.device import Device, megatron_device, select_device
from megadpo.runtime.parallel_state import ParallelState, build_parallel_state, distributed
from megadpo.runtime.rank_logging import silence_libraries
from tests.helpers.training_states import run_identity

KEPT = 2
_ARCH = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 101,
    "tie_word_embeddings": False,
}
_REMOVALS = ("os.remove", "os.rmdir")
_CHANGES = ("os.mkdir", "os.rename", *_REMOVALS)


def save_until_killed(root: Path, asynchronous: bool, dies_at: int | None, word: Connection) -> None:
    """Goes on from the newest checkpoint under `root`, and saves the next steps for ever.

    AssertionError unless every checkpoint that is there is whole, and the newest holds bit for bit what belongs to its
    step. Rank 0 sends the step that it goes on from, and then the number of every step whose save it begins. With
    `dies_at` it kills itself before that one of the first save's changes of files, counted from its first directory.
    """
    with tiny_saver(root, asynchronous=asynchronous) as (saver, policy, state):
        gc.freeze()  # as a training does: Megatron collects garbage in every save, among all that was imported
        done = _go_on(root, policy)
        if state.is_main and dies_at is not None:
            _die_at_change(dies_at, root)
        for step in range(done, sys.maxsize):
            if state.is_main:
                word.send(step)
            if step > done:
                _save(saver, policy, step)
            if dies_at is not None:
                saver.finish()  # all changes are this save's


def save_on_a_slow_disk(root: Path, seconds: float) -> float:
    """Seconds that a second save waits for the one before, whose file takes `seconds` more from when it was begun.

    AssertionError unless the first lets the training go on before any of its file is written, and both hold what
    belongs to their step, although it is changed at once.
    """
    write, goes_on = checkpoint_writer._write_file, threading.Event()

    def slowly(*args: Any) -> Any:
        assert goes_on.wait(60.0), "the training waits for the file"
        time.sleep(seconds)
        return write(*args)

    with (
        mock.patch.object(checkpoint_writer, "_write_file", slowly),
        tiny_saver(root, asynchronous=True) as (saver, policy, _),
    ):
        moments = []
        for step in (1, 2):
            begin_save(saver, policy, step)
            for tensor, _ in _tensors(policy):
                tensor.fill_(-1.0)
            moments.append(time.monotonic())
            goes_on.set()
        saver.complete()
        assert _go_on(root, policy) == 2
        shutil.rmtree(list_checkpoints(root)[-1])
        assert _go_on(root, policy) == 1
    return moments[1] - moments[0]


class ReportsTo(HangWatchdog):
    """A watchdog that watches nothing and hands on what it is told."""

    def __init__(self, on_report: Callable[[int, str], None]) -> None:
        super().__init__(None, rank=0, world=1, patience_s=60.0)
        self.on_report = on_report

    def report(self, step: int, doing: str) -> None:
        self.on_report(step, doing)


@contextmanager
def tiny_saver(
    root: Path, *, asynchronous: bool, at: Callable[[int, str], None] = lambda step, doing: None
) -> Iterator[tuple[CheckpointSaver, Policy, ParallelState]]:
    """What saves a tiny policy under `root`, in the world of this launch."""
    silence_libraries()
    device = select_device("cpu")
    with megatron_device(device), distributed(device, timeout_s=60):
        state = build_parallel_state(tensor=1, pipeline=1, virtual_pipeline=None, seed=0, timeout_s=60)
        policy = _policy(state, device)
        saver = CheckpointSaver(
            root,
            policy.chunks,
            policy.optimizer,
            identity=run_identity(vocab_size=101),
            side_files={"config.json": b"{}", "tokenizer.json": b"{}"},
            dtype=torch.float32,
            retention=Retention(last=KEPT),
            asynchronous=asynchronous,
            resumed_from=None,
            watchdog=ReportsTo(at),
        )
        yield saver, policy, state


def _policy(state: ParallelState, device: Device) -> Policy:
    """A tiny model with its optimizer, whose moments are there."""
    options = ModelOptions(device=device, dtype=torch.float32, sequence_parallel=False)
    modules = build_model(parse_architecture(_ARCH, source="test"), state, options)
    for parameter in modules[0].parameters():
        torch.nn.init.zeros_(parameter)
    chunks = wrap_data_parallel(modules)
    optimizer = build_optimizer(
        chunks, dtype=torch.float32, lr=0.0, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, clip_grad=0.0
    )
    optimizer.step()  # makes the moments
    return Policy(modules, chunks, optimizer)


def _tensors(policy: Policy) -> Iterator[tuple[torch.Tensor, float]]:
    """Weights and moments of this rank, each with what it holds beyond the number of the step."""
    for index, parameter in enumerate(policy.modules[0].parameters()):
        yield parameter.data, index / 64
    for member in distributed_optimizers(policy.optimizer):
        for moments in member.optimizer.state.values():
            yield moments["exp_avg"], 0.25
            yield moments["exp_avg_sq"], 0.5


def _go_on(root: Path, policy: Policy) -> int:
    """Fills the policy from the newest checkpoint, and checks all that there are; the step."""
    checkpoints = list_checkpoints(root)
    assert checkpoints == step_directories(root)
    for checkpoint in checkpoints:
        assert damage_of(checkpoint) == []
    if not checkpoints:
        return 0
    step = step_of(checkpoints[-1])
    load_checkpoint(checkpoints[-1], policy.chunks, policy.optimizer)
    for tensor, more in _tensors(policy):
        assert torch.equal(tensor, torch.full_like(tensor, step + more)), (step, more)
    return step


def _save(saver: CheckpointSaver, policy: Policy, step: int) -> None:
    """Saves what belongs to the step, and changes it at once where the saver lets it."""
    begin_save(saver, policy, step)
    while saver.is_busy:
        for tensor, _ in _tensors(policy):
            tensor.fill_(-1.0)
        time.sleep(0.001)
        if not saver.is_writing:
            saver.complete()


def begin_save(saver: CheckpointSaver, policy: Policy, step: int) -> None:
    """Begins to save what belongs to the step."""
    for tensor, more in _tensors(policy):
        tensor.fill_(step + more)
    saver.save(Progress(step=step))


def _die_at_change(number: int, root: Path) -> None:
    """Has this process kill itself before that change of files under `root`, counted from 0 when a save is begun."""
    left, begun = number, False

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left, begun
        begun = begun or (event == "os.mkdir" and str(arguments[0]).startswith(str(root)))
        if not begun or not _is_change(event, arguments, root):
            return
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    sys.addaudithook(hear)


def _is_change(event: str, arguments: tuple[Any, ...], root: Path) -> bool:
    """Whether an event that Python tells its audit hooks is about to change a name or a content under `root`."""
    name = str(arguments[0]) if arguments else ""
    if event == "open":
        return name.startswith(str(root)) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
    # Inside of a tree that is removed, names are relative.
    return (event in _CHANGES and name.startswith(str(root))) or (event in _REMOVALS and "/" not in name)
