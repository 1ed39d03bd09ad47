"""A rank of a small training whose live tensors are counted: two steps on random weights and tokens."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megadpo.data.loader import BatchBuilder, GlobalBatch
from megadpo.data.tokenization import TokenizedPair
from megadpo.loss.preference import PreferenceLoss
from megadpo.models.builder import build_model
from megadpo.models.hf_config import Architecture, parse_architecture
from megadpo.models.options import ModelOptions, PipelineSplit, Recompute
from megadpo.models.policy import PolicyModel
from megadpo.optimizer.build import DataParallelOptions, build_optimizer, wrap_data_parallel
from megadpo.planner import Cluster, Job, Layout, MemoryKnobs, PairLengths
from megadpo.planner.meter import LiveBytes
from megadpo.reference import ResidentReference
from megadpo.runtime.device import Device, megatron_device, select_device
from megadpo.runtime.parallel_state import ParallelState, build_parallel_state, distributed
from megadpo.train.train_step import train_step

_TIMEOUT_S = 600.0
_STEPS = 2  # the optimizer creates its moments in the first
_RECOMPUTES = {
    "none": Recompute(),
    "mlp": Recompute(granularity="selective", modules=("mlp",)),
    "full": Recompute(granularity="full", method="uniform", num_layers=1),
}


@dataclass(frozen=True, kw_only=True)
class PeakCase:
    """A model (sizes of a Llama), a layout, and the pairs of a step."""

    name: str
    hidden: int
    layers: int
    vocab: int
    ffn: int = 352
    heads: int = 4
    kv_heads: int = 2
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    data: int = 1
    dtype: str = "fp32"
    pairs: int = 32
    budget: int = 1024
    longest: int = 256
    logits_mib: int = 16
    recompute: str = "none"
    first_stage_layers: int | None = None
    grad_reduce_in_fp32: bool = True

    @property
    def arch(self) -> Architecture:
        """The architecture of the model."""
        fields = {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "tie_word_embeddings": False,
        }
        return parse_architecture(fields, source=self.name)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype]

    @property
    def layout(self) -> Layout:
        """The layout, with sequence parallelism if there are several tensor ranks."""
        return Layout(
            tensor=self.tensor,
            pipeline=self.pipeline,
            virtual_pipeline=self.virtual_pipeline,
            data=self.data,
            sequence_parallel=self.tensor > 1,
            split=PipelineSplit(first=self.first_stage_layers),
        )

    def lengths(self) -> list[PairLengths]:
        """The pairs of every step: an irregular mixture, the same each time."""
        rng = np.random.Generator(np.random.PCG64(0))
        drawn = rng.integers(self.longest // 8, self.longest // 2, size=(self.pairs, 3)).tolist()
        return [PairLengths(*lengths) for lengths in drawn]

    def job(self) -> Job:
        """The planner's job for this case."""
        return Job(
            name=self.name,
            arch=self.arch,
            reference=self.arch,
            layout=self.layout,
            knobs=MemoryKnobs(recompute=_RECOMPUTES[self.recompute], grad_reduce_in_fp32=self.grad_reduce_in_fp32),
            cluster=Cluster(),
            dtype=self.torch_dtype,
            steps=(tuple(self.lengths()),),
            longest_pair=0,
            lengths_from="the measurement",
            share_prompt=True,
            tokens_per_microbatch=self.budget,
            logits_mib=self.logits_mib,
            attention="sdpa",
        )


def measure(case: PeakCase) -> dict[str, int]:
    """Runs this rank's part of the case; returns its stage, and the peaks of live tensors and of the resident set."""
    device = select_device("cpu")
    torch.set_num_threads(1)
    with megatron_device(device), distributed(device, timeout_s=_TIMEOUT_S):
        state = build_parallel_state(
            tensor=case.tensor,
            pipeline=case.pipeline,
            virtual_pipeline=case.virtual_pipeline if case.virtual_pipeline > 1 else None,
            seed=0,
            timeout_s=_TIMEOUT_S,
        )
        imported = device.peak_memory_bytes()
        with LiveBytes() as meter:
            training = Training(case, state, device)
            meter.reset_peak()
            for _ in range(_STEPS):
                training.step()
        return {
            "stage": state.pipeline_rank,
            "tensor_bytes": meter.peak,
            "resident_bytes": device.peak_memory_bytes() - imported,
        }


def case_of_sizes(name: str, *, hidden: int, layers: int, vocab: int) -> PeakCase:
    """A case with a model of these sizes, heads of 64, and two short pairs per step."""
    heads = hidden // 64
    return PeakCase(
        name=name,
        hidden=hidden,
        ffn=4 * hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        vocab=vocab,
        pairs=2,
        longest=64,
    )


def seconds_of(action: Callable[[], object]) -> float:
    """Measures the seconds of a call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


class Training:
    """A rank's policy, reference and batch in a case."""

    def __init__(self, case: PeakCase, state: ParallelState, device: Device) -> None:
        self.batch = _batch(case, state)
        self.device = device
        self.reference = ResidentReference(_model(case, state, device, Recompute()), torch_device=device.torch_device)
        self.chunks = wrap_data_parallel(
            _model(case, state, device, case.job().knobs.recompute),
            DataParallelOptions(grad_reduce_in_fp32=case.grad_reduce_in_fp32),
        )
        self.optimizer = build_optimizer(
            self.chunks, dtype=case.torch_dtype, lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, clip_grad=1.0
        )

    def step(self) -> None:
        """Makes one update."""
        loss = PreferenceLoss("sigmoid", beta=0.1)
        train_step(self.chunks, self.optimizer, self.reference, loss, self.batch, device=self.device)


def _batch(case: PeakCase, state: ParallelState) -> GlobalBatch:
    shape = case.job().batch_shape
    rates = case.arch.flop_rates
    builder = BatchBuilder(
        shape=type(shape)(**{**asdict(shape), "data_rank": state.data_rank}),
        tokens_per_microbatch=case.budget,
        pad_token_id=0,
        share_prompt=True,
        flop_rates=rates,
        reference_flop_rates=rates,
    )
    rng = np.random.Generator(np.random.PCG64(1))

    def draw(length: int) -> np.ndarray:
        return rng.integers(case.vocab, size=length).astype(np.int32)

    return builder.build(
        [
            TokenizedPair(index, draw(pair.prompt), draw(pair.chosen), draw(pair.rejected))
            for index, pair in enumerate(case.lengths())
        ]
    )


def _model(case: PeakCase, state: ParallelState, device: Device, recompute: Recompute) -> list[PolicyModel]:
    options = ModelOptions(
        device=device,
        dtype=case.torch_dtype,
        sequence_parallel=case.layout.sequence_parallel,
        logits_mib=case.logits_mib,
        recompute=recompute,
        split=case.layout.split,
    )
    chunks = build_model(case.arch, state, options)
    with torch.no_grad():
        for chunk in chunks:
            for weight in chunk.parameters():
                weight.normal_(std=0.02)
    return chunks


def main(arguments: list[str]) -> int:
    """Measures the case given as JSON, and writes RANK.json to a directory."""
    text, directory = arguments
    fields: dict[str, Any] = json.loads(text)
    measured = measure(PeakCase(**fields))
    Path(directory, f"{os.environ['RANK']}.json").write_text(json.dumps(measured), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
