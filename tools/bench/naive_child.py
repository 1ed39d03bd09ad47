"""The naive rival: DPO in plain transformers, one unpadded sequence at a time, the head on response rows, a live
reference. It is a first implementation without the parts that would make it slow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.job import DTYPES, Job, Link, play_on_device
from megadpo.runtime.device import Device

Pair = Sequence[Sequence[int]]


class NaiveDPO:
    """Policy, reference and AdamW; one step at a time."""

    def __init__(self, job: Job, torch_device: torch.device) -> None:
        self.policy, self.reference = (
            AutoModelForCausalLM.from_pretrained(
                job.model, dtype=DTYPES[job.dtype], attn_implementation="sdpa", local_files_only=True
            )
            .to(torch_device)
            .train(mode)
            for mode in (True, False)
        )
        self.torch_device = torch_device
        self.beta = job.beta
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=job.lr, weight_decay=0.0)

    def step(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        """Makes one update; returns loss, gradient norm before clipping, and the reference's log-probs of the pairs."""
        total = 0.0
        reference_logps = []
        for prompt, *responses in pairs:
            with torch.no_grad():
                reference = [self._logp(self.reference, prompt, response) for response in responses]
            chosen, rejected = (self._logp(self.policy, prompt, response) for response in responses)
            margin = (chosen - rejected) - (reference[0] - reference[1])
            loss = -torch.nn.functional.logsigmoid(self.beta * margin) / len(pairs)
            loss.backward()
            total += loss.item()
            reference_logps.append([logp.item() for logp in reference])
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"loss": total, "grad_norm": norm.item(), "reference_logps": reference_logps}

    def _logp(self, model: Any, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
        """Sum of the response tokens' log-probs."""
        ids = torch.tensor([[*prompt, *response]], device=self.torch_device)
        hidden_TH = model.model(input_ids=ids, use_cache=False).last_hidden_state[0]
        logits_NV = model.lm_head(hidden_TH[len(prompt) - 1 : -1])
        targets_N1 = ids[0, len(prompt) :, None]
        return logits_NV.float().log_softmax(-1).gather(1, targets_N1).double().sum()


def run(job: Job, link: Link, device: Device) -> None:
    """Runs a step on each request. Raises Finished at the end."""
    naive = NaiveDPO(job, device.torch_device)
    pairs = json.loads(Path(job.tokens).read_text(encoding="utf-8"))
    reference_logps: dict[int, list[float]] = {}
    link.answer(ready=True)
    for start in cycle(range(0, len(pairs), job.pairs_per_step)):
        link.wait()
        started = device.mark()
        values = naive.step(pairs[start : start + job.pairs_per_step])
        seconds = device.seconds_between(started, device.mark())
        reference_logps.update(enumerate(values.pop("reference_logps"), start))
        peak = device.peak_memory_bytes()
        link.answer(seconds=seconds, peak_bytes=peak, reference_logps=reference_logps, **values)


if __name__ == "__main__":
    play_on_device(run)
