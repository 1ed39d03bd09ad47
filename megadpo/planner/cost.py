"""The cost of a step: microbatches, FLOPs, bytes that a rank sends, and the minimum time for these on a GPU.

Times are lower bounds: matrix products at the data sheet's dense rate, links at theirs, and everything overlapped. The
fraction that a real step reaches must be measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megadpo.data.loader import stream_widths
from megadpo.data.schedule import schedule_step
from megadpo.loss.logprobs import chunk_rows
from megadpo.metrics.flops import FlopRates, pair_flops, step_flops
from megadpo.models.options import Recompute
from megadpo.planner.job import Job, Layout, PairLengths
from megadpo.planner.memory import StageMemory
from megadpo.planner.pipeline import bubble_share


@dataclass(frozen=True, kw_only=True, slots=True)
class StepLoad:
    """The work of one step: pairs, microbatches per rank, the longest stream, tokens with and without padding, FLOPs.

    `rank_tokens` are the computed tokens of the data rank that has the most. `flops` is that of `flops.step_flops`,
    from true lengths; `linear`, `attention` and `head` are its parts in one forward pass of the policy.
    `logical_tokens` counts every prompt twice.
    """

    pairs: int
    microbatches: int
    stream_tokens: int
    tokens: int
    computed_tokens: int
    rank_tokens: int
    logical_tokens: int
    response_tokens: int
    linear: int
    attention: int
    head: int
    flops: int
    reference_forward: int

    def bubble(self, layout: Layout) -> float:
        """Ratio of the pipeline's idle time to its working time."""
        return bubble_share(stages=layout.pipeline, chunks=layout.virtual_pipeline, microbatches=self.microbatches)

    @property
    def padding(self) -> float:
        """Share of the computed tokens that are padding or fillers."""
        return 1 - self.tokens / self.computed_tokens


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that the busiest rank sends in a step: in its tensor group, between stages, and in its data group."""

    tensor: int
    pipeline: int
    data: int


@dataclass(frozen=True, slots=True)
class Floor:
    """Lower bounds of a step's seconds by resource; `step` is the largest, `bottleneck` its name.

    `serial` is the time at the same rates if nothing overlaps.
    """

    compute: float
    bubble: float
    memory: float
    nvlink: float
    network: float

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by resource; the pipeline's bubble belongs to computing."""
        return {
            "compute": self.compute + self.bubble,
            "memory bandwidth": self.memory,
            "NVLink or PCIe": self.nvlink,
            "network": self.network,
        }

    @property
    def step(self) -> float:
        """Lower bound of a step's seconds."""
        return max(self.parts.values())

    @property
    def bottleneck(self) -> str:
        """Name of the resource that limits the step."""
        return max(self.parts, key=lambda name: self.parts[name])

    @property
    def serial(self) -> float:
        """Lower bound of a step's seconds if nothing overlaps."""
        return sum(self.parts.values())


def step_load(job: Job, pairs: Sequence[PairLengths]) -> StepLoad:
    """Computes the work of a step on these pairs, with the schedule that training would use."""
    shape = job.batch_shape
    lengths = [job.stream_tokens(pair) for pair in pairs]
    rates = job.arch.flop_rates
    policy = [_forward(job, rates, pair) for pair in pairs]
    reference = [_forward(job, job.reference.flop_rates, pair) for pair in pairs if job.knobs.runs_reference]
    schedule = schedule_step(
        lengths,
        policy,
        budget=job.tokens_per_microbatch,
        data_parallel=shape.data_size,
        microbatch_multiple=shape.microbatch_multiple,
    )
    widths = stream_widths(schedule, lengths, shape)
    response = sum(pair.chosen + pair.rejected for pair in pairs)
    linear, head = rates.per_token * sum(lengths), rates.per_response_token * response
    return StepLoad(
        pairs=len(pairs),
        microbatches=len(widths[0]),
        stream_tokens=max(map(max, widths)),
        tokens=sum(lengths),
        computed_tokens=sum(map(sum, widths)),
        rank_tokens=max(map(sum, widths)),
        logical_tokens=sum(2 * pair.prompt + pair.chosen + pair.rejected for pair in pairs),
        response_tokens=response,
        linear=linear,
        attention=sum(policy) - linear - head,
        head=head,
        flops=step_flops(sum(policy), sum(reference)),
        reference_forward=sum(reference),
    )


def _forward(job: Job, rates: FlopRates, pair: PairLengths) -> int:
    return pair_flops(rates, pair.prompt, pair.chosen, pair.rejected, share_prompt=job.share_prompt)


def step_traffic(job: Job, load: StepLoad, stages: Sequence[StageMemory]) -> Traffic:
    """Computes the bytes that the busiest rank sends in a step, by ring algorithms.

    A layer under sequence parallelism gathers and scatters its rows twice in a forward; its backward does the same, and
    gathers its inputs twice more. Without sequence parallelism, two all-reduces replace the pairs of either pass.
    """
    layout = job.layout
    recompute = job.knobs.recompute
    runs_reference = job.knobs.runs_reference
    passes = 2 + runs_reference
    moves = 4 + (6 if layout.sequence_parallel else 4) + 4 * runs_reference + 2 * ("mlp" in recompute.modules)
    ends = passes if layout.pipeline > 1 else 2 * passes  # the embedding's or the head's rows, or both
    rows = load.rank_tokens * job.arch.hidden_size * job.dtype.itemsize
    in_layers = max(moves * sum(stage.layers) + 4 * _recomputed_layers(recompute, stage) for stage in stages)
    gradients = max(stage.gradients for stage in stages)
    weights = max(stage.parameters for stage in stages) * job.dtype.itemsize
    neighbours = layout.pipeline > 1
    return Traffic(
        tensor=round(rows * (in_layers + ends) * _others(layout.tensor)),
        pipeline=passes * rows // layout.sequence_ranks * layout.virtual_pipeline if neighbours else 0,
        data=round((gradients + weights) * _others(layout.data)),
    )


def _recomputed_layers(recompute: Recompute, stage: StageMemory) -> int:
    """Number of layers of a stage that the backward recomputes completely."""
    if recompute.granularity != "full":
        return 0
    if not recompute.is_block:
        return sum(stage.layers)
    assert recompute.num_layers is not None
    return sum(min(recompute.num_layers, layers) for layers in stage.layers)


def _others(ranks: int) -> float:
    """Share of a ring's data that each rank sends."""
    return (ranks - 1) / ranks


def step_floor(job: Job, load: StepLoad, stages: Sequence[StageMemory], traffic: Traffic) -> Floor | None:
    """Computes the minimum time of a step; None if the GPU is unknown, or in fp32, for which no rate is listed."""
    cluster, layout = job.cluster, job.layout
    if cluster.gpu is None or job.dtype.itemsize > 2:
        return None
    assert cluster.network_gb_per_s is not None
    node = cluster.gpus_per_node
    links = [
        (traffic.tensor, layout.tensor),
        (traffic.data, layout.tensor * layout.data),  # data ranks are placed side by side, each with its tensor ranks
        (traffic.pipeline, layout.world_size),
    ]
    inside = sum(sent for sent, reach in links if reach <= node)
    outside = sum(sent for sent, reach in links if reach > node)
    compute = max(_stage_seconds(job, load, stages, stage) for stage in range(len(stages)))
    return Floor(
        compute=compute,
        bubble=compute * load.bubble(layout),
        memory=max(_bytes_touched(job, load, stage) for stage in stages) / (cluster.gpu.memory_tb_per_s * 1e12),
        nvlink=inside / (cluster.gpu.nvlink_gb_per_s * 1e9),
        network=outside / (cluster.network_gb_per_s * 1e9),
    )


def _stage_seconds(job: Job, load: StepLoad, stages: Sequence[StageMemory], stage: int) -> float:
    """Seconds of the matrix products of one stage's ranks, padding and recomputation included."""
    gpu, knobs = job.cluster.gpu, job.knobs
    assert gpu is not None
    quantised = job.fp8_share if gpu.fp8_tflops else 0.0
    seconds_a_tflop = (1 - quantised) / gpu.bf16_tflops + (quantised / gpu.fp8_tflops if gpu.fp8_tflops else 0.0)
    share = sum(stages[stage].layers) / job.arch.num_layers
    reference = load.reference_forward / (load.linear + load.attention + load.head)
    passes = 3 + reference + _recomputed_layers(knobs.recompute, stages[stage]) / sum(stages[stage].layers)
    linear = load.linear * (load.computed_tokens / load.tokens) * (passes + _recomputed_linear(job))
    attention = load.attention * (passes + ("core_attn" in knobs.recompute.modules))
    seconds = share * (linear * seconds_a_tflop + attention / gpu.bf16_tflops)
    if stage == len(stages) - 1:
        seconds += load.head * (3 + reference + _recomputed_head(job, load)) / gpu.bf16_tflops
    return seconds / 1e12 / (job.layout.tensor * job.layout.data)


def _recomputed_linear(job: Job) -> float:
    """Share of a layer's matrix products that selective recomputation repeats: the feed-forward's."""
    if "mlp" not in job.knobs.recompute.modules:
        return 0.0
    arch = job.arch
    mlp = 3 * 2 * arch.hidden_size * arch.ffn_hidden_size * arch.num_layers
    return mlp / arch.flop_rates.per_token


def _recomputed_head(job: Job, load: StepLoad) -> int:
    """1 if a microbatch's logits are more than one chunk, which the backward then recomputes; else 0."""
    vocabulary = job.arch.padded_vocab_size(job.layout.tensor) // job.layout.tensor
    rows = load.response_tokens / (load.microbatches * job.layout.data)
    return int(rows > chunk_rows(vocabulary, dtype=job.dtype, logits_bytes=job.logits_mib * 2**20))


def _bytes_touched(job: Job, load: StepLoad, stage: StageMemory) -> int:
    """Bytes of weights, gradients and optimizer state that a rank must read and write in a step.

    A microbatch reads the weights in the forward, in the backward and for the reference, and adds to the gradients; the
    update reads gradients, reads and writes its state, and writes weights.
    """
    per_microbatch = 2 * stage.weights + stage.reference + stage.visiting + 2 * stage.gradients
    update = 2 * stage.optimizer + (stage.gradients + stage.weights) // job.layout.data
    return load.microbatches * per_microbatch + update
