"""Memory of a rank of each pipeline stage: what it always holds, and the peak of a step's microbatches."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megadpo.planner.job import Job, MemoryKnobs
from megadpo.planner.pipeline import peak_in_flight, stage_work
from megadpo.planner.rehearsal import Footprint, Rehearsals, StagePosition, Stream
from megadpo.planner.shards import Shard

# GPU memory besides tensors. Not measured by this project on a GPU: the CUDA context with its kernels, cuBLAS
# workspaces and NCCL's buffers take one to three GB, and fragmentation of the allocator a few per cent.
CONTEXT_BYTES = 2 * 2**30
FRAGMENTATION = 0.05
_FP32 = 4

# Under FP8 Transformer Engine holds every weight of a layer's matrix quantised beside the bf16 one: once for the
# forward and, if there are gradients, once for these. Scales of blocks count as a fraction of a byte.
_FP8_COPIES_TRAINED, _FP8_COPIES_FROZEN = 2, 1
_SCALE_BYTES = {"tensorwise": 0.0, "delayed": 0.0, "blockwise": 4 / 128, "mxfp8": 1 / 32}


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMemory:
    """Bytes of one rank of a stage. `peak` is the maximum over the three phases of a step.

    `activations` and `head` are those at the peak of the policy's forward and backward passes; `workspace` is
    Megatron's gather buffer for sequence parallelism and the messages between stages. `reference` is weights that are
    always on the device, `visiting` those that are copied there for the reference's pass; `scoring` is additional
    memory of that pass, `update` of the optimizer's. `host` is host memory: optimizer state and offloaded reference.
    """

    stage: int
    layers: tuple[int, ...]
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    reference: int
    visiting: int
    activations: int
    head: int
    workspace: int
    scoring: int
    update: int
    host: int

    @property
    def always(self) -> int:
        """Memory that is always allocated: weights, gradients, optimizer, reference, buffers after their first use."""
        return self.weights + self.gradients + self.optimizer + self.reference + self.workspace

    @property
    def peak(self) -> int:
        """Peak of the bytes of all tensors in a step."""
        return self.always + max(self.activations + self.head, self.scoring, self.update)

    @property
    def allowance(self) -> int:
        """Memory that a GPU needs besides tensors."""
        return CONTEXT_BYTES + round(FRAGMENTATION * self.peak)

    @property
    def total(self) -> int:
        """Memory that a GPU must have."""
        return self.peak + self.allowance


def stage_memory(
    job: Job, stage: int, shard: Shard, reference: Shard, stream: Stream, microbatches: int, rehearsals: Rehearsals
) -> StageMemory:
    """Computes the memory of one stage's ranks in a step of `microbatches`, each at most as long as `stream`."""
    prints = _chunk_footprints(job, stage, shard, stream, rehearsals, head=True)
    headless = _chunk_footprints(job, stage, shard, stream, rehearsals, head=False)
    in_flight = _in_flight(job, stage, prints, microbatches)
    activations = _in_flight(job, stage, headless, microbatches)
    frozen, visiting, waiting = _reference_bytes(job, reference)
    scoring = visiting + _scoring_peak(job, stage, reference, stream, rehearsals) if job.knobs.runs_reference else 0
    optimizer, host, update = _optimizer_bytes(job, shard)
    messages = 0 if job.layout.pipeline == 1 else _message_bytes(job, stream.tokens)
    return StageMemory(
        stage=stage,
        layers=shard.layers,
        parameters=shard.parameters,
        weights=_weight_bytes(job, shard, shard.buffer_parameters, fp8_copies=_FP8_COPIES_TRAINED),
        gradients=shard.buffer_parameters * _gradient_bytes(job),
        optimizer=optimizer,
        reference=frozen,
        visiting=visiting,
        activations=activations,
        head=max(0, in_flight - activations),
        workspace=max(item.workspace for item in prints) + messages,
        scoring=scoring,
        update=update,
        host=host + waiting,
    )


def _message_bytes(job: Job, tokens: int) -> int:
    """Size of a message between stages: the hidden states of a rank's rows."""
    return tokens // job.layout.sequence_ranks * job.arch.hidden_size * job.dtype.itemsize


def _gradient_bytes(job: Job) -> int:
    return _FP32 if job.knobs.grad_reduce_in_fp32 else job.dtype.itemsize


def _weight_bytes(job: Job, shard: Shard, numbers: int, *, fp8_copies: int) -> int:
    """Bytes of `numbers` weights in the model's format, and of the FP8 copies of the layers' matrices."""
    plain = numbers * job.dtype.itemsize
    if job.knobs.fp8 is None:
        return plain
    return plain + round(shard.linear_parameters * fp8_copies * (1 + _SCALE_BYTES[job.knobs.fp8]))


def _reference_bytes(job: Job, shard: Shard) -> tuple[int, int, int]:
    """Bytes of the reference's weights on this rank: (always on the device, only during its pass, on the host).

    Transformer Engine's quantised copies of offloaded weights stay on the device.
    """
    if not job.knobs.runs_reference:
        return 0, 0, 0
    everything = _weight_bytes(job, shard, shard.parameters, fp8_copies=_FP8_COPIES_FROZEN)
    plain = shard.parameters * job.dtype.itemsize
    return (everything, 0, 0) if job.knobs.reference == "resident" else (everything - plain, plain, plain)


def _optimizer_bytes(job: Job, shard: Shard) -> tuple[int, int, int]:
    """Bytes of this rank's share of the optimizer: (on the device, on the host, additionally in an update).

    The host also has a copy of the gradients. An update with bf16 gradients copies them to fp32, unless FusedAdam takes
    them as they are; if a part is offloaded, Megatron keeps that copy of the other part.
    """
    knobs = job.knobs
    numbers = -(-shard.buffer_parameters // job.layout.data)
    state, offloaded = numbers * state_bytes(knobs, job.dtype), knobs.optimizer.offload_fraction
    on_host = round(state * offloaded)
    copies = _gradient_bytes(job) < _FP32 and not knobs.optimizer.precision_aware
    copied = round(numbers * _FP32 * (1 - offloaded)) if copies else 0
    on_device = state - on_host
    host = on_host + round(numbers * _FP32 * offloaded)
    return (on_device + copied, host, 0) if offloaded else (on_device, 0, copied)


def state_bytes(knobs: MemoryKnobs, dtype: torch.dtype) -> int:
    """Bytes of optimizer state per parameter: an fp32 main weight (except in fp32 with torch's AdamW), two moments."""
    optimizer = knobs.optimizer
    has_main = dtype.itemsize < _FP32 or optimizer.precision_aware
    moments = optimizer.exp_avg_dtype.itemsize + optimizer.exp_avg_sq_dtype.itemsize
    return moments + (_FP32 if has_main else 0)


def _positions(job: Job, stage: int, chunks: int, *, head: bool) -> list[StagePosition]:
    last = job.layout.pipeline - 1
    return [
        StagePosition(embeds=stage == 0 and chunk == 0, scores=head and stage == last and chunk == chunks - 1)
        for chunk in range(chunks)
    ]


def _chunk_footprints(
    job: Job, stage: int, shard: Shard, stream: Stream, rehearsals: Rehearsals, *, head: bool
) -> list[Footprint]:
    positions = _positions(job, stage, len(shard.layers), head=head)
    footprints = [
        rehearsals.chunk(job, job.arch, stream, position, layers)
        for position, layers in zip(positions, shard.layers, strict=True)
    ]
    return [item.less(layers * _fp8_saving(job, stream)) for item, layers in zip(footprints, shard.layers, strict=True)]


def _fp8_saving(job: Job, stream: Stream) -> int:
    """Bytes that a layer saves because the inputs of its matrices are saved quantised.

    The output projection's input is an exception: attention saves it unquantised, and Megatron shares that tensor.
    """
    knobs, arch = job.knobs, job.arch
    if knobs.fp8 is None or knobs.recompute.granularity == "full":
        return 0
    rows, ranks = stream.tokens // job.layout.sequence_ranks, job.layout.tensor
    inputs = rows * arch.hidden_size
    if "mlp" not in knobs.recompute.modules:
        inputs += rows * arch.hidden_size + stream.tokens * arch.ffn_hidden_size // ranks
    return round(inputs * (job.dtype.itemsize - 1 - _SCALE_BYTES[knobs.fp8]))


def _in_flight(job: Job, stage: int, footprints: list[Footprint], microbatches: int) -> int:
    work = stage_work(stage, stages=job.layout.pipeline, chunks=len(footprints), microbatches=microbatches)
    return peak_in_flight(
        work,
        [item.saved for item in footprints],
        [item.forward_peak for item in footprints],
        [item.backward_peak for item in footprints],
    )


def _scoring_peak(job: Job, stage: int, reference: Shard, stream: Stream, rehearsals: Rehearsals) -> int:
    """Peak of a forward without gradients, which saves nothing: the largest peak of a single chunk."""
    positions = _positions(job, stage, len(reference.layers), head=True)
    return max(
        rehearsals.chunk(job, job.reference, stream, position, layers).scoring_peak
        for position, layers in zip(positions, reference.layers, strict=True)
    )
