"""Measures a model on the held-out pairs with plain transformers, one sequence at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from demo.corpus import Pair, is_courteous

ANSWERED_PROMPTS = 16


@dataclass(frozen=True)
class PairLogps:
    """Summed response log-probs, in nats, of one model: fp64 [n] each."""

    chosen: torch.Tensor
    rejected: torch.Tensor

    @property
    def accuracy(self) -> float:
        """Share of pairs whose chosen response is strictly likelier."""
        return (self.chosen > self.rejected).double().mean().item()


@dataclass(frozen=True)
class Rewards:
    """Implicit rewards of a trained policy relative to its reference, over the same pairs."""

    accuracy: float
    margin: float


@dataclass(frozen=True)
class Measured:
    """One model on the held-out pairs: log-probs of every pair, and its own answers to the first prompts."""

    logps: PairLogps
    answers: list[str]
    courteous: int


def load(directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the model in fp32 and evaluation mode, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(directory)


def common_prefix(first: list[int], second: list[int]) -> int:
    """The number of leading tokens that two lists share."""
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


@torch.no_grad()
def response_logp(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[dict[str, str]],
    response: list[dict[str, str]],
) -> float:
    """The summed log-probability, in nats, of the response's tokens (the end token included) after the prompt."""
    prompt_ids = tokenizer.apply_chat_template(prompt, tokenize=True, return_dict=True, add_generation_prompt=True)
    ids = tokenizer.apply_chat_template(prompt + response, tokenize=True, return_dict=True)["input_ids"]
    start = common_prefix(prompt_ids["input_ids"], ids)
    logits_TV = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, start - 1 : -1]
    logps_T = logits_TV.log_softmax(-1).gather(1, torch.tensor(ids[start:])[:, None])
    return logps_T.double().sum().item()


def pair_logps(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[Pair]) -> PairLogps:
    """Log-probs of both responses of every pair, in order."""
    chosen, rejected = (
        torch.tensor([response_logp(model, tokenizer, p["prompt"], p[kind]) for p in pairs], dtype=torch.float64)
        for kind in ("chosen", "rejected")
    )
    return PairLogps(chosen, rejected)


def rewards(policy: PairLogps, reference: PairLogps, *, beta: float) -> Rewards:
    """Reward accuracy and mean reward margin β[(lp_π − lp_ref)(chosen) − (lp_π − lp_ref)(rejected)]."""
    margin_B = beta * ((policy.chosen - reference.chosen) - (policy.rejected - reference.rejected))
    return Rewards(accuracy=(margin_B > 0).double().mean().item(), margin=margin_B.mean().item())


@torch.no_grad()
def greedy_answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[dict[str, str]]) -> str:
    """The model's likeliest answer, token by token, without special tokens."""
    inputs = tokenizer.apply_chat_template(
        prompt, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    length = inputs["input_ids"].shape[1]
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    output = model.generate(**inputs, **ends, max_new_tokens=48, do_sample=False)
    return tokenizer.decode(output[0, length:], skip_special_tokens=True).strip()


def measure(directory: Path, pairs: list[Pair]) -> Measured:
    """Measures everything that is reported of a model directory, with its answers to ANSWERED_PROMPTS prompts."""
    model, tokenizer = load(directory)
    asked = pairs[:ANSWERED_PROMPTS]
    answers = [greedy_answer(model, tokenizer, pair["prompt"]) for pair in asked]
    courteous = sum(is_courteous(a, pair["prompt"][0]["content"]) for a, pair in zip(answers, asked, strict=True))
    return Measured(pair_logps(model, tokenizer, pairs), answers, courteous)
