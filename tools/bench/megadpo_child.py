"""megadpo as a contender: the whole training program, stopped before each step until the parent requests it.

A step's seconds are those from the request to the beginning of the next step: the batch, both passes, the update and
the logging of one iteration of the loop.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.ablation_patches import ReferenceTap, patches
from bench.ablations import ABLATIONS, Ablation
from bench.job import Job, Link, play
from megadpo.commands.command_line import check
from megadpo.commands.train import run_training
from megadpo.config.compose import compose_config
from megadpo.planner.meter import LiveBytes
from megadpo.runtime.device import Device, Mark
from megadpo.runtime.rank_logging import configure_logging, global_rank, silence_libraries
from megadpo.train.train_step import train_step

_FOREVER = 1_000_000


def overrides(job: Job) -> list[str]:
    """The overrides of the run."""
    return [
        "+model=hf",
        f"model.hf_path={job.model}",
        f"data.train_path={job.pairs}",
        f"data.max_length={job.max_length}",
        "data.truncation=keep_start",
        # Room for a pair of the longest sequences, so that memory compares with rivals that hold a sequence or two.
        f"data.tokens_per_microbatch={2 * job.max_length}",
        "data.workers=1",
        f"train.global_batch_size={job.pairs_per_step}",
        f"train.max_steps={_FOREVER}",
        "train.shuffle=false",
        f"train.run_dir={job.out}",
        f"loss.beta={job.beta}",
        f"optimizer.lr={job.lr}",
        "optimizer.schedule=constant",
        "optimizer.clip_grad=1.0",
        f"precision.dtype={job.dtype}",
        f"device.kind={job.device}",
        "trackers=[jsonl]",
        *job.overrides,
    ]


class Gate:
    """Waits for the parent's request before every training step."""

    def __init__(self, job: Job, link: Link, tap: ReferenceTap, meter: LiveBytes | None) -> None:
        self.job = job
        self.link = link
        self.tap = tap
        self.meter = meter
        self.started: Mark | None = None

    def train_step(self, *args: Any, device: Device, **kwargs: Any) -> Any:
        """Calls `megadpo.train.train_step.train_step` when the parent requests it. Raises Finished at the end."""
        if self.started is None:
            torch.set_num_threads(self.job.threads)
            self.link.answer(ready=True)
        else:
            seconds = device.seconds_between(self.started, device.mark())
            peak_bytes = device.peak_memory_bytes() if self.meter is None else self.meter.peak
            self.link.answer(seconds=seconds, peak_bytes=peak_bytes, **self._known())
        self.link.wait()
        self.started = device.mark()
        return train_step(*args, device=device, **kwargs)

    def _known(self) -> dict[str, Any]:
        """The logged metrics of the step, and the reference's log-probs so far; ranks other than 0 answer nothing."""
        if global_rank() != 0:
            return {}
        self.tap.write_down()
        lines = (Path(self.job.out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return {**json.loads(lines[-1]), "reference_logps": self.tap.logps}


def run(job: Job, link: Link) -> None:
    """Trains step by step. Raises Finished at the end, and does not destroy the process groups."""
    ablation = ABLATIONS[job.ablation] if job.ablation else Ablation()
    config = compose_config([*overrides(job), *ablation.overrides], check=check)
    tap = ReferenceTap(cached=ablation.cached_reference)
    with ExitStack() as stack:
        gate = Gate(job, link, tap, stack.enter_context(LiveBytes()) if job.count_tensors else None)
        for patch in (*tap.patches(), *patches(ablation)):
            stack.enter_context(patch)
        stack.enter_context(mock.patch("megadpo.train.trainer.train_step", gate.train_step))
        run_training(config)


if __name__ == "__main__":
    configure_logging()
    silence_libraries()
    play(run)
