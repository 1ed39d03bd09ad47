"""Suggests layouts of a model on a number of GPUs: plans them one after the other, and ranks them by step time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from megadpo.models.fp8 import unaligned_features
from megadpo.models.fp8_recipes import token_multiple
from megadpo.models.hf_config import Architecture
from megadpo.models.options import Recompute
from megadpo.planner.job import Job, Layout
from megadpo.planner.memory import state_bytes
from megadpo.planner.plan import Plan, make_plan
from megadpo.planner.rehearsal import Rehearsals

# With more chunks per stage, messages would dominate.
_MOST_CHUNKS = 8
# Kinds of recomputation that are tried, the cheapest first. Not the attention core alone: flash attention saves no
# scores, so that there is almost nothing to gain.
RECOMPUTES = (
    Recompute(),
    Recompute(granularity="selective", modules=("mlp",)),
    Recompute(granularity="full", method="uniform", num_layers=1),
)
_WEIGHT_BYTES = 2


@dataclass(frozen=True, slots=True)
class Ranking:
    """Plans that fit, the fastest first, and the number of layouts that were considered."""

    plans: tuple[Plan, ...]
    looked_at: int


def suggest(
    job: Job, recomputes: Sequence[Recompute], *, report: Callable[[int, int], None] = lambda done, total: None
) -> Ranking:
    """Finds layouts of the job's model on its GPUs that fit, with the given kinds of recomputation.

    For each layout the first kind that fits is taken: list them from the cheapest. Plans are ranked by the step's time
    if nothing overlaps, since in practice much of it is not hidden; if the GPU's rates are unknown, by memory. `report`
    is called with the number of layouts that are done, and their total.
    """
    rehearsals = Rehearsals()
    layouts = [layout for layout in layouts_of(job) if not _cannot_fit(job, layout)]
    plans = []
    for done, layout in enumerate(layouts):
        for recompute in recomputes:
            plan = make_plan(replace(job, layout=layout, knobs=replace(job.knobs, recompute=recompute)), rehearsals)
            if plan.fits:
                plans.append(plan)
                break
        report(done + 1, len(layouts))
    return Ranking(tuple(sorted(plans, key=_ranking_key)), looked_at=len(list(layouts_of(job))))


def layouts_of(job: Job) -> Iterator[Layout]:
    """Yields all layouts that the model allows, with tensor ranks inside a machine, and a pair for each data rank."""
    world, arch = job.layout.world_size, job.arch
    pairs = max(map(len, job.steps))  # a smaller last step would leave data ranks without a pair
    for tensor in _divisors(world):
        if tensor > job.cluster.gpus_per_node or not _takes_budget(job, tensor):
            continue
        if not all(_splits(model, tensor, job.knobs.fp8) for model in (arch, job.reference)):
            continue
        for pipeline in _divisors(world // tensor):
            if max(job.knobs.layers_in_bf16) > arch.num_layers // pipeline:
                continue  # they would be more than an outer stage has
            data = world // (tensor * pipeline)
            if data > pairs:
                continue
            for chunks in range(1, _MOST_CHUNKS + 1 if pipeline > 1 else 2):
                if all(model.num_layers % (pipeline * chunks) == 0 for model in (arch, job.reference)):
                    yield Layout(
                        tensor=tensor,
                        pipeline=pipeline,
                        virtual_pipeline=chunks,
                        data=data,
                        sequence_parallel=tensor > 1,
                    )


def _takes_budget(job: Job, tensor: int) -> bool:
    """True if the token budget is a multiple of what an FP8 recipe needs on this number of tensor ranks."""
    if job.knobs.padded_for is None:
        return True
    multiple = token_multiple(job.knobs.padded_for, tensor=tensor, context=1, sequence_parallel=tensor > 1)
    return job.tokens_per_microbatch % multiple == 0


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _splits(arch: Architecture, tensor: int, fp8: str | None) -> bool:
    groups = arch.num_query_groups
    shared_evenly = groups % tensor == 0 or tensor % groups == 0
    if arch.num_attention_heads % tensor or arch.ffn_hidden_size % tensor or not shared_evenly:
        return False
    return fp8 is None or unaligned_features(arch, fp8, tensor=tensor) is None


def _cannot_fit(job: Job, layout: Layout) -> bool:
    """True if weights, gradients and optimizer alone are too large, so that no model needs to be built."""
    if (
        job.cluster.memory_gib is None
        or job.knobs.optimizer.offload_fraction
        or job.knobs.fp8
        or job.dtype.itemsize > 2
    ):
        return False
    knobs, ranks = job.knobs, layout.tensor * layout.pipeline
    per_parameter = _WEIGHT_BYTES + (4 if knobs.grad_reduce_in_fp32 else _WEIGHT_BYTES)
    policy = job.arch.num_parameters * (per_parameter + state_bytes(knobs, job.dtype) / layout.data)
    reference = job.reference.num_parameters * _WEIGHT_BYTES if knobs.runs_reference else 0
    return (policy + reference) / ranks > job.cluster.memory_gib * 2**30


def _ranking_key(plan: Plan) -> tuple[float, int]:
    return (plan.floor.serial if plan.floor is not None else 0.0, plan.fullest.total)
