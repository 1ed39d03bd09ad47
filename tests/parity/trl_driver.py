"""Runs TRL's DPOTrainer in fp32 on CPU and writes down every number that another trainer can be held to.

A program of its own, `python trl_driver.py --model DIR --reference DIR --train FILE.jsonl --out DIR ...`, because TRL,
accelerate and the Trainer change process-wide state. It changes no number of TRL's. It writes

    OUT/metrics.jsonl   one object a step, TRL's keys: step, loss, grad_norm, learning_rate, rewards/*, logps/*
    OUT/samples.jsonl   one object a pair, in order: step, {policy,reference}_{chosen,rejected}_logp (sums, nats)
    OUT/final/          the trained model, a Hugging Face directory
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

# Read at import: nothing here may ask the network or a GPU, and nothing reports anywhere.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    CUDA_VISIBLE_DEVICES="",
)

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import DPOConfig, DPOTrainer


def parse_arguments() -> argparse.Namespace:
    """The command line; every number is required, so that a test states all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "reference", "train", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("seed", "steps", "batch", "accum", "warmup", "max-length"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("lr", "beta", "weight-decay", "clip-grad"):
        parser.add_argument(f"--{name}", type=float, required=True)
    return parser.parse_args()


def dpo_config(options: argparse.Namespace) -> DPOConfig:
    """Plain AdamW with a linear schedule, file order, everything logged at every step, nothing saved on the way."""
    return DPOConfig(
        output_dir=str(options.out / "trainer"),
        seed=options.seed,
        beta=options.beta,
        loss_type="sigmoid",
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accum,
        learning_rate=options.lr,
        lr_scheduler_type="linear",
        warmup_steps=options.warmup,
        optim="adamw_torch",
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        weight_decay=options.weight_decay,
        max_grad_norm=options.clip_grad,
        max_length=options.max_length,
        truncation_mode="keep_start",
        train_sampling_strategy="sequential",
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        logging_nan_inf_filter=False,  # the default shows a NaN loss as the mean of earlier ones
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        eval_strategy="no",
    )


def load_model(directory: Path) -> PreTrainedModel:
    """A fp32 model with the plainest attention."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")


def record_logps(model: torch.nn.Module, into: list[list[float]]) -> None:
    """Appends the summed response log-probs of every forward pass; TRL puts chosen sequences before rejected ones."""

    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        into.append(output.log_probs.detach().double().sum(1).tolist())  # TRL zeroes what is not response

    model.register_forward_hook(hook)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def samples(policy: list[list[float]], reference: list[list[float]], *, accum: int) -> list[dict[str, float]]:
    """One record a pair, from the recorded passes (one a microbatch and model)."""
    rows = []
    for index, (of_policy, of_reference) in enumerate(zip(policy, reference, strict=True)):
        for pc, pr, rc, rr in zip(*_halves(of_policy), *_halves(of_reference), strict=True):
            logps = {"policy_chosen_logp": pc, "policy_rejected_logp": pr}
            logps |= {"reference_chosen_logp": rc, "reference_rejected_logp": rr}
            rows.append({"step": index // accum + 1, **logps})
    return rows


def _halves(logps: list[float]) -> tuple[list[float], list[float]]:
    """The chosen and the rejected half of one pass."""
    return logps[: len(logps) // 2], logps[len(logps) // 2 :]


def main() -> None:
    """Trains and writes the results."""
    options = parse_arguments()
    torch.set_num_threads(1)  # one order of summation, however many cores
    torch.use_deterministic_algorithms(True)
    disable_progress_bars()
    records = [json.loads(line) for line in options.train.read_text(encoding="utf-8").splitlines()]
    trainer = DPOTrainer(
        model=load_model(options.model),
        ref_model=load_model(options.reference),
        args=dpo_config(options),
        train_dataset=Dataset.from_list(records),
        processing_class=AutoTokenizer.from_pretrained(options.model),
    )
    policy_logps: list[list[float]] = []
    reference_logps: list[list[float]] = []
    record_logps(trainer.model, policy_logps)
    record_logps(trainer.ref_model, reference_logps)
    trainer.train()
    options.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(options.out / "metrics.jsonl", [line for line in trainer.state.log_history if "loss" in line])
    write_jsonl(options.out / "samples.jsonl", samples(policy_logps, reference_logps, accum=options.accum))
    trainer.save_model(str(options.out / "final"))


if __name__ == "__main__":
    main()
