"""The plan of one layout: its stages' memory, a step's load, traffic and floor, and whether it fits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megadpo.planner.cost import Floor, StepLoad, Traffic, step_floor, step_load, step_traffic
from megadpo.planner.job import Job, PairLengths
from megadpo.planner.memory import StageMemory, stage_memory
from megadpo.planner.rehearsal import Rehearsals, Stream
from megadpo.planner.shards import Shard, build_shard
from megadpo.runtime.device import megatron_device, planning_device

_GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The plan of a job. `load` is that of the step with the most FLOPs, `stages` the memory at `stream_tokens`.

    `floor` is None if the rates of the GPU are unknown.
    """

    job: Job
    stages: tuple[StageMemory, ...]
    model_parameters: int
    stream_tokens: int
    load: StepLoad
    traffic: Traffic
    floor: Floor | None

    @property
    def fullest(self) -> StageMemory:
        """The stage whose ranks need the most memory."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def bubble(self) -> float:
        """Ratio of the pipeline's idle time to its working time."""
        return self.load.bubble(self.job.layout)

    @property
    def fits(self) -> bool:
        """True if every rank has the memory that it needs, or no memory is given."""
        capacity = self.job.cluster.memory_gib
        return capacity is None or self.fullest.total <= capacity * _GIB

    def refusal(self) -> str:
        """The reason why the layout does not fit, and settings to change."""
        stage, capacity = self.fullest, self.job.cluster.memory_gib
        card = f"the card ({self.job.cluster.gpu_name}) has" if self.job.cluster.gpu_name else "a card has"
        largest = ", ".join(f"{name} {size / _GIB:.1f}" for name, size in _largest(stage))
        return (
            f"{self.job.layout} does not fit: a rank of stage {stage.stage} needs {stage.total / _GIB:.2f} GiB, "
            f"{card} {capacity:.5g} GiB; most of it are, in GiB, {largest}: {', or '.join(_remedies(self))}; "
            "tools/plan.py --suggest ranks the layouts that fit"
        )


def make_plan(job: Job, rehearsals: Rehearsals | None = None) -> Plan:
    """Makes the plan of a job from its real shards; no process group may be open.

    `rehearsals` may be shared by plans of one model, since layouts often have the same layers.
    """
    rehearsals = rehearsals or Rehearsals()
    loads = [step_load(job, pairs) for pairs in job.steps]
    load = max(loads, key=lambda step: step.flops)
    microbatches = max(step.microbatches for step in loads)
    stream = Stream(job.widest_stream, _mean_pair(pair for step in job.steps for pair in step), job.share_prompt)
    with megatron_device(planning_device()):
        shards = [build_shard(job, job.arch, stage) for stage in range(job.layout.pipeline)]
        stages = tuple(
            stage_memory(job, stage, shard, _reference_shard(job, stage, shard), stream, microbatches, rehearsals)
            for stage, shard in enumerate(shards)
        )
    traffic = step_traffic(job, load, stages)
    return Plan(
        job=job,
        stages=stages,
        model_parameters=sum(shard.model_parameters for shard in shards),
        stream_tokens=stream.tokens,
        load=load,
        traffic=traffic,
        floor=step_floor(job, load, stages, traffic),
    )


def _reference_shard(job: Job, stage: int, policy: Shard) -> Shard:
    return policy if job.reference == job.arch else build_shard(job, job.reference, stage)


def _mean_pair(pairs: Iterable[PairLengths]) -> PairLengths:
    known = list(pairs)
    prompt, chosen, rejected = (
        max(1, round(sum(lengths) / len(known)))
        for lengths in zip(*((pair.prompt, pair.chosen, pair.rejected) for pair in known), strict=True)
    )
    return PairLengths(prompt, chosen, rejected)


def _largest(stage: StageMemory) -> list[tuple[str, int]]:
    """The parts of a stage's memory, the largest first."""
    parts = {
        "weights": stage.weights,
        "gradients": stage.gradients,
        "optimizer": stage.optimizer,
        "reference": _reference_at_peak(stage),
        "activations": stage.scoring - stage.visiting if _peaks_in_scoring(stage) else stage.activations,
        "head": stage.head,
        "allowance": stage.allowance,
    }
    return sorted(parts.items(), key=lambda item: -item[1])[:4]


def _peaks_in_scoring(stage: StageMemory) -> bool:
    """True if the peak of a step is in the reference's pass."""
    return stage.scoring > max(stage.activations + stage.head, stage.update)


def _reference_at_peak(stage: StageMemory) -> int:
    """Bytes of the reference's weights that are on the device at the peak of a step."""
    return stage.reference + (stage.visiting if _peaks_in_scoring(stage) else 0)


def _remedies(plan: Plan) -> list[str]:
    """Settings that reduce the fullest rank's memory, the cheapest first."""
    job, stage, layout = plan.job, plan.fullest, plan.job.layout
    remedies = []
    if stage.activations + stage.head > stage.total // 8:
        if job.knobs.recompute.granularity != "full":
            remedies.append("set model.recompute_granularity=full")
        if job.tokens_per_microbatch > job.longest_stream:
            remedies.append(f"lower data.tokens_per_microbatch={job.tokens_per_microbatch}")
        else:
            remedies.append("lower data.max_length")
    if _reference_at_peak(stage) > stage.total // 8:
        leaner = ["cached"] if job.knobs.fp8 != "tensorwise" else []  # one scale per microbatch: nothing to save
        leaner += ["offload"] if job.knobs.reference == "resident" else []
        remedies += [f"set reference.mode={' or '.join(leaner)}"] if leaner else []
    optimizer = job.knobs.optimizer
    if stage.optimizer > stage.total // 8 and not (optimizer.precision_aware or optimizer.offload_fraction):
        remedies.append("set optimizer.precision_aware=true with moments in 16 bits")
        if job.dtype.itemsize < 4:
            remedies.append("optimizer.cpu_offload=true")
    if layout.tensor < job.cluster.gpus_per_node and layout.data > 1:
        remedies.append(f"raise parallel.tensor={layout.tensor} within a machine's {job.cluster.gpus_per_node} cards")
    if layout.data > 1:
        remedies.append(f"raise parallel.pipeline={layout.pipeline}")
    remedies.append(f"take more than {layout.world_size} cards")
    return remedies
