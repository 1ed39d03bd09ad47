"""Prints plans as tables in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from megadpo.planner.job import Job
from megadpo.planner.memory import CONTEXT_BYTES, FRAGMENTATION, StageMemory
from megadpo.planner.plan import Plan
from megadpo.planner.suggest import Ranking

_GIB = 2**30
_LAST_PHASE = "or: reference pass"


def print_plan(plan: Plan, console: Console) -> None:
    """Prints a job's memory by stage, its schedule and traffic, and the lower bound of a step's time."""
    job = plan.job
    console.print(
        f"[bold]{job.name}[/bold]: {plan.model_parameters:,} parameters on {job.layout.world_size} x "
        f"{job.cluster.gpu_name or 'ranks'}: {job.layout}"
        f"{', sequence parallel' if job.layout.sequence_parallel else ''}, recomputation {job.knobs.recompute}"
        f"{f', FP8 {job.knobs.fp8}' if job.knobs.fp8 else ''}"
    )
    console.print(f"\nGiB on each rank of a stage{_verdict(plan)}")
    console.print(_memory_table(plan))
    console.print("\nA step")
    console.print(_step_table(plan))
    console.print(
        f"Pairs: {job.lengths_from}. Memory is that of a stream of {plan.stream_tokens} tokens, the longest a step may "
        f"have. The allowance is not measured: {CONTEXT_BYTES / _GIB:g} GiB for CUDA, cuBLAS and NCCL, and "
        f"{FRAGMENTATION:.0%} for the allocator's gaps.{_not_counted(job)}",
        style="dim",
    )


def _not_counted(job: Job) -> str:
    """Settings whose cost a plan does not fully include."""
    knobs = job.knobs
    said = {
        "What the optimizer on the host sends and takes there is not in the times.": knobs.optimizer.offload_fraction,
        "Memory takes layers that stay in bf16 for quantised ones.": knobs.fp8 and any(knobs.layers_in_bf16),
        "What an offloaded reference takes to come in is not in the times.": knobs.reference == "offload",
        "Completing the reference's cache is not in the plan: it comes before.": knobs.reference == "cached",
        "FP8 is emulated: planned as bf16, it is slower.": knobs.padded_for and not knobs.fp8,
    }
    return "".join(f" {sentence}" for sentence, applies in said.items() if applies)


def print_ranking(ranking: Ranking, job: Job, console: Console, *, most: int) -> None:
    """Prints the best layouts that fit, with their overrides for the command line."""
    table = Table(title=f"{len(ranking.plans)} of {ranking.looked_at} layouts fit; the fastest:", title_justify="left")
    columns = ("layout", "recomputation", "GiB", "bubble", "floor s", "serial s", "bottleneck")
    for name in columns:
        table.add_column(name, justify="left" if name in ("layout", "recomputation", "bottleneck") else "right")
    for plan in ranking.plans[:most]:
        floor = plan.floor
        times = (f"{floor.step:.2f}", f"{floor.serial:.2f}", floor.bottleneck) if floor else ("", "", "")
        table.add_row(
            str(plan.job.layout),
            str(plan.job.knobs.recompute),
            f"{plan.fullest.total / _GIB:.1f}",
            f"{plan.bubble:.1%}",
            *times,
        )
    console.print(table)
    for plan in ranking.plans[:most]:
        console.print(f"{plan.job.layout}:  {' '.join(overrides(plan))}", soft_wrap=True, highlight=False)


def overrides(plan: Plan) -> list[str]:
    """The command line's overrides for a plan's layout and recomputation."""
    layout, recompute = plan.job.layout, plan.job.knobs.recompute
    words = [f"parallel.tensor={layout.tensor}", f"parallel.pipeline={layout.pipeline}"]
    words.append(f"parallel.virtual_pipeline={layout.virtual_pipeline if layout.virtual_pipeline > 1 else 'null'}")
    if recompute.granularity is not None:
        words.append(f"model.recompute_granularity={recompute.granularity}")
    if recompute.granularity == "selective":
        words.append(f"model.recompute_modules=[{','.join(recompute.modules)}]")
    return words


def _verdict(plan: Plan) -> str:
    capacity = plan.job.cluster.memory_gib
    return "" if capacity is None else f"; {'fits' if plan.fits else 'does not fit'} {capacity:g} GiB"


def _memory_table(plan: Plan) -> Table:
    table = Table()
    table.add_column("", justify="left")
    for stage in plan.stages:
        table.add_column(f"stage {stage.stage}", justify="right")
    table.add_row("layers", *("+".join(map(str, stage.layers)) for stage in plan.stages))
    table.add_row("parameters", *(f"{stage.parameters / 1e9:.3f} B" for stage in plan.stages), end_section=True)
    for name, sizes in _memory_rows(plan.stages):
        if any(sizes):
            table.add_row(name, *(f"{size / _GIB:.2f}" for size in sizes), end_section=name == _LAST_PHASE)
    return table


def _memory_rows(stages: Sequence[StageMemory]) -> list[tuple[str, list[int]]]:
    return [
        ("weights", [stage.weights for stage in stages]),
        ("gradients", [stage.gradients for stage in stages]),
        ("optimizer", [stage.optimizer for stage in stages]),
        ("reference", [stage.reference for stage in stages]),
        ("buffers of communication", [stage.workspace for stage in stages]),
        ("activations", [stage.activations for stage in stages]),
        ("log-prob head", [stage.head for stage in stages]),
        ("or: update", [stage.update for stage in stages]),
        (_LAST_PHASE, [stage.scoring for stage in stages]),
        ("tensors at the peak", [stage.peak for stage in stages]),
        ("allowance", [stage.allowance for stage in stages]),
        ("needed", [stage.total for stage in stages]),
        ("on the host", [stage.host for stage in stages]),
    ]


def _step_table(plan: Plan) -> Table:
    load, traffic, floor = plan.load, plan.traffic, plan.floor
    world = plan.job.layout.world_size
    table = Table(show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="left")
    table.add_row("pairs", f"{load.pairs}, {load.logical_tokens:,} tokens (prompts twice)")
    table.add_row("microbatches of a rank", f"{load.microbatches} of {load.stream_tokens} tokens")
    table.add_row("padding", f"{load.padding:.1%} of {load.computed_tokens:,} computed tokens")
    table.add_row("pipeline bubble", f"{plan.bubble:.1%} of the working time")
    table.add_row("FLOPs", f"{load.flops:.3e}, {load.reference_forward / load.flops:.0%} of them the reference's")
    sent = {"tensor ranks": traffic.tensor, "stages": traffic.pipeline, "data ranks": traffic.data}
    table.add_row(
        "sent by a rank",
        ", ".join(f"{size / _GIB:.1f} GiB between {name}" for name, size in sent.items() if size) or "nothing",
    )
    if floor is not None:
        parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in floor.parts.items())
        table.add_row("floor of its time", f"{floor.step:.2f} s, limited by {floor.bottleneck} ({parts})")
        table.add_row("when nothing overlaps", f"{floor.serial:.2f} s")
        table.add_row(
            "so at most",
            f"{load.pairs / floor.step:.1f} pairs/s, {load.logical_tokens / floor.step / world:,.0f} tokens/s and "
            f"{load.flops / floor.step / world / 1e12:.0f} TFLOP/s on each card",
        )
    return table
