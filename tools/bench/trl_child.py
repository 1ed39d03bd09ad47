"""TRL's DPOTrainer as a contender: its own loop, stopped by a callback before each step until it is requested."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from bench.job import DTYPES, Job, Link, play_on_device
from megadpo.runtime.device import Device, Mark

_FOREVER = 1_000_000


def dpo_config(job: Job) -> DPOConfig:
    """TRL's configuration: AdamW at a constant rate, the file's order, the loss logged at every step, nothing saved."""
    return DPOConfig(
        output_dir=job.out,
        seed=0,
        beta=job.beta,
        loss_type=["sigmoid"],
        max_steps=_FOREVER,
        per_device_train_batch_size=job.pairs_per_step,
        gradient_accumulation_steps=1,
        learning_rate=job.lr,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_length=job.max_length,
        truncation_mode="keep_start",
        train_sampling_strategy="sequential",
        use_cpu=job.device == "cpu",
        bf16=job.dtype == "bf16",
        fp16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        logging_nan_inf_filter=False,  # the default replaces a NaN loss by the mean of earlier ones
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        eval_strategy="no",
    )


class Gate(TrainerCallback):
    """Waits for the parent's request before every training step, and receives its logged metrics."""

    def __init__(self, link: Link, device: Device) -> None:
        self.link = link
        self.device = device
        self.started: Mark | None = None
        self.logged: Mapping[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any) -> None:
        """Keeps the step's numbers."""
        self.logged = logs

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Answers for the finished step and waits for the next one. Raises Finished at the end."""
        if self.started is None:
            self.link.answer(ready=True)
        else:
            self.link.answer(
                seconds=self.device.seconds_between(self.started, self.device.mark()),
                loss=self.logged["loss"],
                grad_norm=self.logged["grad_norm"],
                peak_bytes=self.device.peak_memory_bytes(),
            )
        self.link.wait()
        self.started = self.device.mark()


def load_model(job: Job) -> Any:
    """Loads a model with transformers' defaults."""
    return AutoModelForCausalLM.from_pretrained(job.model, dtype=DTYPES[job.dtype], local_files_only=True)


def run(job: Job, link: Link, device: Device) -> None:
    """Trains step by step. Raises Finished at the end."""
    disable_progress_bars()
    lines = Path(job.pairs).read_text(encoding="utf-8").splitlines()
    trainer = DPOTrainer(
        model=load_model(job),
        ref_model=load_model(job),
        args=dpo_config(job),
        train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        callbacks=[Gate(link, device)],
    )
    trainer.train()


if __name__ == "__main__":
    play_on_device(run)
