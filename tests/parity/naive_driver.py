"""DPO in plain torch and transformers, one sequence at a time: slow, and with nothing in it that could go wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run depends on besides its model, reference and data; the schedule is linear after the warm-up."""

    steps: int
    batch: int
    accum: int
    lr: float
    beta: float
    warmup: int
    weight_decay: float
    clip_grad: float
    max_length: int

    @property
    def pairs_per_step(self) -> int:
        """Pairs of the global batch."""
        return self.batch * self.accum

    def lr_at(self, step: int) -> float:
        """The learning rate of step 1, 2, …: the schedule's value before that step."""
        done = step - 1
        if done < self.warmup:
            return self.lr * done / self.warmup
        return self.lr * (self.steps - done) / (self.steps - self.warmup)


@dataclass(frozen=True)
class TokenizedPair:
    """Token ids; the prompt is what both of its sequences have in common with it."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class NaiveRun:
    """Metrics of every step, per-pair log-probs in order, and the trained weights by Hugging Face name."""

    lines: list[dict[str, float]]
    samples: list[dict[str, float]]
    weights: dict[str, torch.Tensor]


def read_pairs(path: Path, tokenizer: Any, *, max_length: int) -> list[TokenizedPair]:
    """The pairs of a file: sequences are cut to `max_length` tokens, pairs whose prompt alone is that long left out."""
    pairs = [_tokenize(json.loads(line), tokenizer) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        TokenizedPair(p.prompt, p.chosen[: max_length - len(p.prompt)], p.rejected[: max_length - len(p.prompt)])
        for p in pairs
        if len(p.prompt) < max_length
    ]


def _tokenize(record: dict[str, Any], tokenizer: Any) -> TokenizedPair:
    """One pair: plain text, whose responses get one end token, or messages, which the chat template renders."""
    prompt, chosen, rejected = (record[key] for key in ("prompt", "chosen", "rejected"))
    plain = isinstance(prompt, str)
    if plain:
        texts = [prompt, *(prompt + response + tokenizer.eos_token for response in (chosen, rejected))]
    else:
        render = tokenizer.apply_chat_template
        texts = [render(prompt, tokenize=False, add_generation_prompt=True)]
        texts += [render(prompt + response, tokenize=False) for response in (chosen, rejected)]
    # The chat template writes the beginning-of-sequence token itself
    prompt_ids, *wholes = (tokenizer(text, add_special_tokens=plain)["input_ids"] for text in texts)
    start = min(_common_prefix(prompt_ids, whole) for whole in wholes)
    return TokenizedPair(prompt_ids[:start], wholes[0][start:], wholes[1][start:])


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def response_logp(model: torch.nn.Module, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Σ log p(response token | what precedes it): fp64 scalar with gradient."""
    ids = torch.tensor([prompt + response])
    logps = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logps.gather(1, torch.tensor(response)[:, None]).double().sum()


def run_naive(model_dir: Path, reference_dir: Path, train_path: Path, settings: Settings) -> NaiveRun:
    """DPO over the file's pairs in order, fp32; line k holds what step k computed before its update."""
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32, attn_implementation="eager")
        for d in (model_dir, reference_dir)
    )
    pairs = read_pairs(train_path, AutoTokenizer.from_pretrained(model_dir), max_length=settings.max_length)
    matrices = [p for p in policy.parameters() if p.ndim > 1]
    vectors = [p for p in policy.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    lines: list[dict[str, float]] = []
    samples: list[dict[str, float]] = []
    n = settings.pairs_per_step
    for step in range(1, settings.steps + 1):
        of_step = [
            _backward_pair(policy, reference, pair, beta=settings.beta, weight=1 / n)
            for pair in pairs[(step - 1) * n : step * n]
        ]
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.clip_grad).item()
        for group in optimizer.param_groups:
            group["lr"] = settings.lr_at(step)
        optimizer.step()
        optimizer.zero_grad()
        samples += [{"step": step, **sample} for sample in of_step]
        lines.append(_line(of_step, settings) | {"step": step, "grad_norm": grad_norm, "lr": settings.lr_at(step)})
    return NaiveRun(lines, samples, {name: p.detach() for name, p in policy.named_parameters()})


def _backward_pair(
    policy: torch.nn.Module, reference: torch.nn.Module, pair: TokenizedPair, *, beta: float, weight: float
) -> dict[str, float]:
    """Adds the gradient of weight · loss of one pair; its loss and log-probs."""
    with torch.no_grad():
        ref_chosen = response_logp(reference, pair.prompt, pair.chosen)
        ref_rejected = response_logp(reference, pair.prompt, pair.rejected)
    chosen = response_logp(policy, pair.prompt, pair.chosen)
    rejected = response_logp(policy, pair.prompt, pair.rejected)
    loss = -torch.nn.functional.logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))
    (weight * loss).backward()
    return {
        "loss": loss.item(),
        "policy_chosen_logp": chosen.item(),
        "policy_rejected_logp": rejected.item(),
        "reference_chosen_logp": ref_chosen.item(),
        "reference_rejected_logp": ref_rejected.item(),
    }


def _line(samples: list[dict[str, float]], settings: Settings) -> dict[str, float]:
    """Means over the pairs of a step, under the names of metrics.jsonl."""
    rewards = [
        tuple(
            settings.beta * (s[f"policy_{kind}_logp"] - s[f"reference_{kind}_logp"]) for kind in ("chosen", "rejected")
        )
        for s in samples
    ]
    columns = {
        "loss": [s["loss"] for s in samples],
        "logps/chosen": [s["policy_chosen_logp"] for s in samples],
        "logps/rejected": [s["policy_rejected_logp"] for s in samples],
        "rewards/chosen": [chosen for chosen, _ in rewards],
        "rewards/rejected": [rejected for _, rejected in rewards],
        "rewards/margins": [chosen - rejected for chosen, rejected in rewards],
        "rewards/accuracies": [float(chosen > rejected) for chosen, rejected in rewards],
    }
    return {name: sum(values) / len(values) for name, values in columns.items()}
