"""The measured process of `logprob.py`: one output layer's inputs, and all variants of its response log-probs.

Each line on stdin starts the job's next run; each answer is one line of JSON. Memory is read by the parent.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from bench.job import DTYPES, Finished, Link, leave
from megadpo.loss.logprobs import chunk_rows, response_log_probs
from megadpo.runtime.device import megatron_device, select_device
from megadpo.runtime.parallel_state import build_parallel_state, distributed

# Not measured: libraries load and start their threads.
_WARMUP_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadJob:
    """An output layer, and the measurement: the time of all variants in `turns`, or the memory of one variant."""

    runs: tuple[tuple[int, bool], ...]
    """(rows of the stream, whether with a backward): one after the other, and for memory each larger than the last"""
    vocab: int
    hidden: int
    prompt_share: float
    """of the rows; they predict nothing that is scored"""
    dtype: str
    """fp32 | bf16"""
    logits_mib: int
    variants: tuple[str, ...]
    turns: int
    """0: memory"""

    def to_json(self) -> str:
        """Serializes the job as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> HeadJob:
        """Parses the output of `to_json`."""
        values = json.loads(text)
        runs = tuple((int(tokens), bool(backward)) for tokens, backward in values["runs"])
        return cls(**{**values, "runs": runs, "variants": tuple(values["variants"])})

    @property
    def chunk_bytes(self) -> int:
        """Size of the fp32 logits of one chunk of the fused head."""
        rows = chunk_rows(self.vocab, dtype=DTYPES[self.dtype], logits_bytes=self.logits_mib * 2**20)
        return rows * self.vocab * 4


@dataclass(frozen=True, slots=True)
class Inputs:
    """T rows, a head [V, H], targets of all rows, the N rows that are scored, and the gradient of their log-probs.

    `trained_VH` is the same head as in Megatron's DDP, with a buffer for its gradient in fp32.
    """

    hidden_TH: torch.Tensor
    weight_VH: torch.Tensor
    trained_VH: torch.Tensor
    targets_T: torch.Tensor
    rows_N: torch.Tensor
    grad_N: torch.Tensor
    logits_bytes: int


def make_inputs(job: HeadJob, tokens: int) -> Inputs:
    """Makes random inputs whose logits have a standard deviation of about 1, and allocates nothing else."""
    generator = torch.Generator().manual_seed(0)
    dtype = DTYPES[job.dtype]
    hidden_TH = torch.randn(tokens, job.hidden, generator=generator, dtype=dtype)
    weight_VH = torch.randn(job.vocab, job.hidden, generator=generator, dtype=dtype).mul_(job.hidden**-0.5)
    trained_VH = weight_VH.detach()
    if any(name in OURS for name in job.variants) and any(backward for _, backward in job.runs):
        buffer: Any = trained_VH
        buffer.main_grad, buffer.grad_added_to_main_grad = torch.full(weight_VH.shape, 0.0), False
    rows = tokens - int(tokens * job.prompt_share)
    return Inputs(
        hidden_TH=hidden_TH.requires_grad_(),
        weight_VH=weight_VH.requires_grad_(),
        trained_VH=trained_VH.requires_grad_(),
        targets_T=torch.randint(job.vocab, (tokens,), generator=generator),
        rows_N=torch.arange(tokens - rows, tokens),
        grad_N=torch.randn(rows, generator=generator),
        logits_bytes=job.logits_mib * 2**20,
    )


def log_softmax(x: Inputs) -> torch.Tensor:
    """log_softmax + gather over all rows."""
    logps_TV = torch.nn.functional.linear(x.hidden_TH, x.weight_VH).float().log_softmax(-1)
    return logps_TV.gather(1, x.targets_T[:, None]).squeeze(1)[x.rows_N]


def log_softmax_on_response_rows(x: Inputs) -> torch.Tensor:
    """log_softmax + gather over the rows that are scored."""
    rows_NH = x.hidden_TH.index_select(0, x.rows_N)
    logps_NV = torch.nn.functional.linear(rows_NH, x.weight_VH).float().log_softmax(-1)
    return logps_NV.gather(1, x.targets_T[x.rows_N, None]).squeeze(1)


def megatron_cross_entropy(x: Inputs) -> torch.Tensor:
    """Megatron's vocabulary-parallel cross entropy over all rows."""
    logits_T1V = torch.nn.functional.linear(x.hidden_TH, x.weight_VH)[:, None]
    losses_T: torch.Tensor = vocab_parallel_cross_entropy(logits_T1V, x.targets_T[:, None]).squeeze(1)
    return -losses_T[x.rows_N]


def fused(x: Inputs) -> torch.Tensor:
    """The fused head over all rows."""
    return _ours(x, x.hidden_TH, x.targets_T)[x.rows_N]


def fused_on_response_rows(x: Inputs) -> torch.Tensor:
    """The fused head over the rows that are scored, as in the program."""
    return _ours(x, x.hidden_TH.index_select(0, x.rows_N), x.targets_T[x.rows_N])


def _ours(x: Inputs, rows_NH: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    assert dist.group.WORLD is not None
    vocab = x.weight_VH.shape[0]
    return response_log_probs(
        rows_NH,
        x.trained_VH,
        targets_N,
        group=dist.group.WORLD,
        vocab_start=0,
        vocab_size=vocab,
        logits_bytes=x.logits_bytes,
    ).logps_N


NAIVE, SELF = "log_softmax + gather", "fused, response rows"
VARIANTS: dict[str, Callable[[Inputs], torch.Tensor]] = {
    NAIVE: log_softmax,
    "log_softmax + gather, response rows": log_softmax_on_response_rows,
    "Megatron's cross entropy": megatron_cross_entropy,
    "fused": fused,
    SELF: fused_on_response_rows,
}
OURS = ("fused", SELF)


def run(variant: str, x: Inputs, *, backward: bool) -> torch.Tensor:
    """Computes log-probs [N], returned without gradient; with `backward`, the inputs get new gradients."""
    for tensor in (x.hidden_TH, x.weight_VH, x.trained_VH):
        tensor.grad = None
    with torch.set_grad_enabled(backward):
        logps_N = VARIANTS[variant](x)
    if backward:
        logps_N.backward(x.grad_N)
    return logps_N.detach()


def result_bytes(variant: str, x: Inputs, *, backward: bool) -> int:
    """Size of the log-probs, and of the gradients that did not exist before."""
    gradients = [x.hidden_TH, *([] if variant in OURS else [x.weight_VH])] if backward else []
    return sum(tensor.numel() * tensor.itemsize for tensor in (x.grad_N, *gradients))


def measure_memory(job: HeadJob, link: Link) -> None:
    """Performs the variant's runs, and stops before and after each, so that the parent can read the memory."""
    (variant,) = job.variants
    run(variant, make_inputs(job, _WARMUP_TOKENS), backward=job.runs[0][1])
    for tokens, backward in job.runs:
        x = make_inputs(job, tokens)
        # The selected rows and their gradient.
        row_bytes = (2 if backward else 1) * x.rows_N.numel() * job.hidden * x.hidden_TH.itemsize
        link.answer(result_bytes=result_bytes(variant, x, backward=backward), row_bytes=row_bytes)
        link.wait()
        run(variant, x, backward=backward)
        link.answer()
        link.wait()
        del x


def measure_time(job: HeadJob, link: Link) -> None:
    """Answers {variant: (CPU seconds, seconds)} for each turn; the order is reversed from turn to turn."""
    ((tokens, backward),) = job.runs
    for variant in job.variants:
        run(variant, make_inputs(job, _WARMUP_TOKENS), backward=backward)
    x = make_inputs(job, tokens)
    for turn in range(job.turns):
        seconds = {}
        for variant in job.variants if turn % 2 == 0 else reversed(job.variants):
            cpu, wall = time.process_time(), time.perf_counter()
            run(variant, x, backward=backward)
            seconds[variant] = (time.process_time() - cpu, time.perf_counter() - wall)
        link.answer(seconds=seconds)
    link.answer(**(compare(x) if backward else {}))


def compare(x: Inputs) -> dict[str, float]:
    """Differences of the fused head to log_softmax + gather: maximum of log-probs, relative norm of gradients."""
    expected = (run(NAIVE, x, backward=True), _grad(x.hidden_TH), _grad(x.weight_VH))
    buffer: Any = x.trained_VH
    buffer.main_grad.zero_()
    actual = (run(SELF, x, backward=True), _grad(x.hidden_TH), buffer.main_grad)
    largest = float((actual[0] - expected[0]).abs().max())
    hidden, weight = (float((a - b).norm() / b.norm()) for a, b in zip(actual[1:], expected[1:], strict=True))
    return {"logps": largest, "grad_hidden": hidden, "grad_weight": weight}


def _grad(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad.float()


def main(job: HeadJob) -> None:
    """Measures until the job is done or the parent closes the pipe."""
    link = Link()
    device = select_device("cpu")
    with megatron_device(device), distributed(device, timeout_s=60):
        build_parallel_state(tensor=1, pipeline=1, virtual_pipeline=None, seed=0, timeout_s=60)
        try:
            (measure_time if job.turns else measure_memory)(job, link)
        except Finished:
            leave()


if __name__ == "__main__":
    main(HeadJob.from_json(sys.argv[1]))
