"""The planner: exact parameter counts, saved bytes counted by hand, schedules, knobs, and what is refused with why."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

from megadpo.commands.command_line import check_plan
from megadpo.config.compose import compose_config
from megadpo.data.loader import BatchBuilder
from megadpo.data.tokenization import TokenizedPair
from megadpo.errors import ConfigError
from megadpo.models.hf_config import Architecture, parse_architecture
from megadpo.models.options import PipelineSplit, Recompute
from megadpo.optimizer.build import OptimizerOptions
from megadpo.planner import Cluster, Job, Layout, MemoryKnobs, PairLengths, make_plan
from megadpo.planner.cost import step_load, step_traffic
from megadpo.planner.memory import stage_memory
from megadpo.planner.meter import LiveBytes
from megadpo.planner.pipeline import Work, bubble_share, peak_in_flight, stage_work
from megadpo.planner.rehearsal import Footprint, Rehearsals, StagePosition, Stream
from megadpo.planner.report import overrides
from megadpo.planner.shards import Shard, build_shard
from megadpo.planner.suggest import layouts_of, suggest
from megadpo.runtime.device import megatron_device, planning_device
from megadpo.runtime.gpus import GPUS, find_gpu
from tests.helpers.jobs.planning import end_left_world
from tests.helpers.published import PUBLISHED
from tools import plan as plan_tool

H100 = Cluster(
    gpu_name="h100",
    gpu=GPUS["h100"],
    memory_gib=GPUS["h100"].memory_gib,
    network_gb_per_s=GPUS["h100"].network_gb_per_s,
)
FULL = Recompute(granularity="full", method="uniform", num_layers=1)
# Of all tests: what is rehearsed twice is the same.
REHEARSALS = Rehearsals()
SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1001,
    "tie_word_embeddings": False,
}


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Takes back what a tool's own set-up of logging does to this process."""
    logger = logging.getLogger("megadpo")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture(autouse=True)
def no_world() -> None:
    end_left_world()


def small(**fields: Any) -> Architecture:
    return parse_architecture({**SMALL, **fields}, source="small")


def job(arch: Architecture, layout: Layout, **fields: Any) -> Job:
    settings: dict[str, Any] = {
        "name": "test",
        "arch": arch,
        "reference": arch,
        "layout": layout,
        "knobs": MemoryKnobs(),
        "cluster": Cluster(),
        "dtype": torch.bfloat16,
        "steps": ((PairLengths(40, 30, 20),) * 64,),
        "longest_pair": 0,
        "lengths_from": "the test",
        "share_prompt": True,
        "tokens_per_microbatch": 512,
        "logits_mib": 128,
    }
    return Job(**{**settings, **fields})


def shards(planned: Job) -> list[Shard]:
    with megatron_device(planning_device()):
        return [build_shard(planned, planned.arch, stage) for stage in range(planned.layout.pipeline)]


# Parameters


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("Llama-3-8B", Layout(tensor=2, data=4, sequence_parallel=True)),
        ("Llama-3-70B", Layout(tensor=8, pipeline=16, data=4, sequence_parallel=True)),
        ("Llama-3-70B", Layout(tensor=8, pipeline=4, virtual_pipeline=5, data=2, sequence_parallel=True)),
        ("Qwen2.5-7B", Layout(tensor=4, pipeline=2, sequence_parallel=True)),
    ],
)
def test_ranks_of_a_published_model_hold_it_exactly(name: str, layout: Layout) -> None:
    # tests/unit/config/test_compose_presets.py holds the numbers to transformers' own models on the meta device.
    fields, published = PUBLISHED[name]
    assert sum(shard.model_parameters for shard in shards(job(parse_architecture(fields, source=name), layout))) == (
        published
    )


@pytest.mark.parametrize("tied", [False, True])
def test_padding_and_tied_copies_are_not_of_the_model(tied: bool) -> None:
    arch = small(tie_word_embeddings=tied)
    first, last = shards(job(arch, Layout(tensor=2, pipeline=2)))
    padded = arch.padded_vocab_size(2)
    norms_and_layers = 4 * (2 * 64 + (64 * 64 + 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160) // 2)
    assert first.parameters == padded * 64 // 2 + norms_and_layers
    assert last.parameters == first.parameters + 64  # a copy where it is tied, and the final norm
    assert first.model_parameters + last.model_parameters == arch.num_parameters
    assert first.layers == last.layers == (4,)
    assert last.linear_parameters == 4 * (64 * 64 + 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160) // 2


def test_outer_stages_hold_what_they_are_given() -> None:
    uneven = Layout(pipeline=4, split=PipelineSplit(first=1, last=3))
    planned = shards(job(small(), uneven))
    assert [shard.layers for shard in planned] == [(1,), (2,), (2,), (3,)]
    assert sum(shard.model_parameters for shard in planned) == small().num_parameters
    assert str(uneven) == "tp1 x pp4 x dp1 (1 layers in the first stage, 3 layers in the last stage)"


# What a layer keeps


def saved_by_a_layer(planned: Job, stream: Stream) -> int:
    with megatron_device(planning_device()):
        two, three = (
            REHEARSALS.chunk(planned, planned.arch, stream, StagePosition(False, False), layers) for layers in (2, 3)
        )
    return three.saved - two.saved


# Tensor ranks; recomputation; bytes a token and layer of what is shared by sequence ranks, and of what is split.
H, Q, KV, F = 64, 64, 32, 160
KEPT = {
    "all": (Recompute(), 4 * H, (Q + 2 * KV) + Q + KV + Q + 3 * F),
    "mlp": (Recompute(granularity="selective", modules=("mlp",)), 4 * H, (Q + 2 * KV) + Q + KV + Q),
    "full": (FULL, H, 0),
}


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("kept", KEPT)
def test_a_layer_keeps_what_is_counted_by_hand(kept: str, tensor: int) -> None:
    """Inputs of both norms and of the matrices behind them; queries, keys and values as projected (values stay views of
    them), queries and keys turned; the attention's output; gate and up, and their product."""
    recompute, between, inside = KEPT[kept]
    layout = Layout(tensor=tensor, sequence_parallel=tensor > 1)
    planned = job(small(), layout, knobs=MemoryKnobs(recompute=recompute), share_prompt=False)
    tokens, pair = 520, PairLengths(100, 100, 60)
    saved = saved_by_a_layer(planned, Stream(tokens, pair, False))
    statistics = 0 if kept == "full" else tokens * (2 * 4 + 8 * 4) // tensor  # a norm's, the softmax's; fp32
    assert abs(saved - (2 * tokens * (between + inside) // tensor + statistics)) <= 256  # random states


def test_shared_prompts_are_gathered_for_the_second_response() -> None:
    planned, pair = job(small(), Layout()), PairLengths(100, 100, 60)
    together = saved_by_a_layer(planned, Stream(260, pair, True))
    apart = saved_by_a_layer(planned, Stream(260, PairLengths(65, 65, 65), False))
    # Keys and values of 260 rows and the 100 of the prompt once more, in place of the turned keys; and as nothing views
    # the projection any more, that goes too.
    assert together - apart == 2 * (2 * KV * 360 - KV * 260 - (Q + 2 * KV) * 260)


def test_block_recomputation_lies_between_none_and_all() -> None:
    place, stream, arch = StagePosition(True, False), Stream(512, PairLengths(40, 30, 20), True), small()
    prints: dict[str, Footprint] = {}
    ways = {
        "none": Recompute(),
        "block": Recompute(granularity="full", method="block", num_layers=3),
        "full": FULL,
        "groups": Recompute(granularity="full", method="uniform", num_layers=4),
    }
    with megatron_device(planning_device()):
        for name, recompute in ways.items():
            planned = job(arch, Layout(), knobs=MemoryKnobs(recompute=recompute))
            prints[name] = REHEARSALS.chunk(planned, arch, stream, place, 8)
    saved = {name: item.saved for name, item in prints.items()}
    assert saved["groups"] < saved["full"] < saved["block"] < saved["none"]
    assert saved["none"] - saved["block"] == pytest.approx(3 / 8 * (saved["none"] - saved["full"]), rel=0.01)
    assert prints["groups"].backward_peak - saved["groups"] > 2 * (prints["full"].backward_peak - saved["full"])


def test_the_meter_counts_shared_memory_once_and_until_its_last_tensor() -> None:
    with LiveBytes() as meter:
        first = torch.zeros(100)
        view = first.view(10, 10)
        del first
        assert meter.now == 400
        _ = view + 1
        assert meter.peak == 800
        del view, _
        assert meter.now == 0
        meter.reset_peak()
    assert meter.peak == 0


# Schedules


def megatrons(stage: int, stages: int, chunks: int, microbatches: int) -> tuple[int, list[int]]:
    """Where Megatron's schedule has its first backward, and the chunks of its forwards."""
    ranks = SimpleNamespace(
        pp_group=SimpleNamespace(size=lambda: stages, rank=lambda: stage),
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
    )
    total, all_warmup, warmup, _ = get_pp_rank_microbatches(microbatches, chunks, stages, p2p_communicator=ranks)
    order = [chunk for _, chunk in get_schedule_table(microbatches, chunks, stages)]
    return total if all_warmup else warmup + 1, order


def place_of_first_backward(work: list[Work]) -> int:
    return next(place for place, item in enumerate(work) if not item.is_forward)


@pytest.mark.parametrize(("stages", "chunks", "microbatches"), [(1, 1, 3), (4, 1, 6), (4, 1, 2), (2, 2, 4), (4, 3, 8)])
def test_stages_work_as_megatron_has_them(stages: int, chunks: int, microbatches: int) -> None:
    for stage in range(stages):
        work = list(stage_work(stage, stages=stages, chunks=chunks, microbatches=microbatches))
        assert Counter(work) == {
            Work(chunk, forward): microbatches for chunk in range(chunks) for forward in (True, False)
        }
        if stages > 1:
            assert (place_of_first_backward(work), [item.chunk for item in work if item.is_forward]) == megatrons(
                stage, stages, chunks, microbatches
            )
        live = Counter[int]()
        for item in work:
            live[item.chunk] += 1 if item.is_forward else -1
            assert live[item.chunk] >= 0


def test_in_flight_by_hand() -> None:
    # Stage 0 of 2: forwards of 1 and 2, backward of 1, forward of 3 beside 2, ...
    work = list(stage_work(0, stages=2, chunks=1, microbatches=3))
    assert [item.is_forward for item in work] == [True, True, False, True, False, False]
    assert peak_in_flight(iter(work), [10], [12], [15]) == 10 + 15
    assert peak_in_flight(stage_work(1, stages=2, chunks=1, microbatches=3), [10], [12], [15]) == 15
    # All three of chunk 0 and the fourth forward, of chunk 1, before the first backward.
    work = list(stage_work(0, stages=2, chunks=2, microbatches=2))
    assert [item.chunk for item in work] == [0, 0, 1, 1, 1, 1, 0, 0]
    assert peak_in_flight(iter(work), [10, 1], [12, 3], [15, 30]) == 21 + 30


def test_bubble() -> None:
    assert bubble_share(stages=4, chunks=1, microbatches=8) == 3 / 8
    assert bubble_share(stages=4, chunks=5, microbatches=8) == 3 / 40
    assert bubble_share(stages=1, chunks=1, microbatches=1) == 0


@pytest.mark.parametrize("layout", [Layout(data=3), Layout(pipeline=2, virtual_pipeline=2, data=2)])
def test_the_load_is_the_schedule_of_training(layout: Layout) -> None:
    arch = small()
    lengths = [PairLengths(20 + i % 7, 10 + 3 * (i % 5), 30 - i % 11) for i in range(50)]
    load = step_load(job(arch, layout, steps=(tuple(lengths),), tokens_per_microbatch=300), lengths)
    builder = BatchBuilder(
        shape=job(arch, layout).batch_shape,
        tokens_per_microbatch=300,
        pad_token_id=0,
        share_prompt=True,
        flop_rates=arch.flop_rates,
        reference_flop_rates=arch.flop_rates,
    )
    blank = torch.zeros(50, dtype=torch.int32).numpy()
    batch = builder.build(
        [TokenizedPair(i, blank[: p.prompt], blank[: p.chosen], blank[: p.rejected]) for i, p in enumerate(lengths)]
    )
    assert (load.microbatches, load.stream_tokens) == (len(batch.microbatches), batch.stream_tokens)
    assert (load.computed_tokens, load.logical_tokens) == (batch.computed_tokens, batch.logical_tokens)
    assert load.flops == 3 * batch.flops + batch.reference_flops
    assert load.linear + load.attention + load.head == batch.flops
    assert load.padding == pytest.approx(batch.padding_tokens / batch.computed_tokens)


# Knobs


def memory(planned: Job, **knobs: Any) -> Any:
    planned = replace(planned, knobs=MemoryKnobs(**knobs))
    with megatron_device(planning_device()):
        shard = build_shard(planned, planned.arch, 0)
        return stage_memory(planned, 0, shard, shard, Stream(120, PairLengths(40, 30, 20), True), 2, REHEARSALS)


def test_knobs_change_what_a_number_takes() -> None:
    planned = job(small(num_hidden_layers=2), Layout(data=4))
    plain = memory(planned)
    numbers = plain.gradients // 4
    assert plain.parameters <= numbers <= plain.parameters + 2**16
    assert (plain.weights, plain.reference) == (2 * numbers, 2 * plain.parameters)  # the policy's in padded buffers
    assert (plain.optimizer, plain.host, plain.update) == (3 * numbers, 0, 0)  # 12 bytes over four ranks
    offloaded = memory(planned, optimizer=OptimizerOptions(offload_fraction=0.75))
    assert offloaded.optimizer == plain.optimizer // 4
    assert offloaded.host == plain.optimizer * 3 // 4 + numbers // 4 * 3  # with an fp32 copy of the gradients there
    fewer = OptimizerOptions(precision_aware=True, exp_avg_dtype=torch.uint8, exp_avg_sq_dtype=torch.float16)
    aware = memory(planned, optimizer=fewer, grad_reduce_in_fp32=False)
    assert (aware.optimizer, aware.update) == (numbers // 4 * 7, 0)
    low = memory(planned, grad_reduce_in_fp32=False)
    assert (low.gradients, low.update) == (2 * numbers, numbers)  # with an fp32 copy of a rank's quarter in the update
    exact = memory(replace(planned, dtype=torch.float32, attention="sdpa"))
    assert (exact.weights, exact.optimizer) == (4 * numbers, 2 * numbers)
    # Of gradients in bf16, what is updated beside the model is copied in fp32, and Megatron keeps the copy.
    half = memory(planned, optimizer=OptimizerOptions(offload_fraction=0.5), grad_reduce_in_fp32=False)
    assert (half.optimizer, half.update) == (plain.optimizer // 2 + numbers // 4 * 2, 0)
    assert plain.peak == plain.always + plain.activations + plain.head


def test_a_reference_takes_memory_and_work_by_its_mode() -> None:
    planned = job(small(num_hidden_layers=2), Layout(tensor=2, pipeline=2, sequence_parallel=True))
    found = {mode: memory(planned, reference=mode) for mode in ("resident", "offload", "cached", "none")}
    resident, offload, cached = found["resident"], found["offload"], found["cached"]
    size = 2 * resident.parameters
    assert (resident.reference, resident.visiting, resident.host) == (size, 0, 0)
    assert (offload.reference, offload.visiting, offload.host) == (0, size, size)
    assert offload.scoring == resident.scoring + size
    assert (cached.reference, cached.visiting, cached.host, cached.scoring) == (0, 0, 0, 0) and found["none"] == cached
    assert resident.peak - size == cached.peak <= offload.peak
    loads = {mode: step_load(with_reference(planned, mode), planned.steps[0]) for mode in found}
    assert loads["resident"] == loads["offload"] and loads["cached"] == loads["none"]
    assert loads["resident"].flops - loads["cached"].flops == loads["resident"].reference_forward > 0
    assert loads["cached"].reference_forward == 0
    sent = {mode: step_traffic(with_reference(planned, mode), loads[mode], [found[mode]]) for mode in found}
    assert sent["offload"] == sent["resident"]
    assert 3 * sent["cached"].pipeline == 2 * sent["resident"].pipeline
    assert sent["cached"].tensor < sent["resident"].tensor and sent["cached"].data == sent["resident"].data


def with_reference(planned: Job, mode: str) -> Job:
    return replace(planned, knobs=MemoryKnobs(reference=mode))


def test_fp8_keeps_quantised_inputs_and_copies_of_weights() -> None:
    planned = job(small(num_hidden_layers=2), Layout())
    plain, fp8, blocks = memory(planned), memory(planned, fp8="tensorwise"), memory(planned, fp8="mxfp8")
    matrices = 2 * (2 * (H * Q + H * KV) + 3 * H * F)
    assert fp8.weights - plain.weights == 2 * matrices  # for the forward and for gradients
    assert fp8.reference - plain.reference == matrices
    assert blocks.weights - plain.weights == round(2 * matrices * (1 + 1 / 32))
    assert plain.activations - fp8.activations == 2 * 120 * (H + H + F)
    assert memory(planned, fp8="tensorwise", recompute=FULL).activations < fp8.activations


# Times, verdicts, suggestions


def test_the_floor_names_its_bottleneck() -> None:
    arch = parse_architecture(PUBLISHED["Llama-3-8B"][0], source="8B")
    steps = ((PairLengths(512, 512, 512),) * 64,)
    inside = job(arch, Layout(tensor=2, data=4, sequence_parallel=True), cluster=H100, steps=steps)
    inside = replace(inside, tokens_per_microbatch=8192)
    plan = make_plan(inside, REHEARSALS)
    assert plan.floor is not None and plan.floor.bottleneck == "compute" and plan.floor.network == 0
    # Matrix products alone at the data sheet's rate cannot be faster than all of the step's FLOPs.
    assert plan.floor.step >= plan.load.flops / (8 * 989.4e12)
    rows = plan.load.rank_tokens * 4096 * 2
    assert plan.traffic.tensor == rows * (14 * 32 + 6) // 2
    assert plan.traffic.data == pytest.approx(6 * plan.stages[0].parameters * 3 / 4, rel=1e-3)
    apart = make_plan(replace(inside, cluster=replace(H100, gpus_per_node=1, network_gb_per_s=1.0)), REHEARSALS)
    assert apart.floor is not None and apart.floor.bottleneck == "network" and apart.floor.nvlink == 0
    assert apart.floor.serial > apart.floor.step
    assert make_plan(replace(inside, cluster=Cluster(memory_gib=79.0)), REHEARSALS).floor is None


def test_recomputation_costs_time_and_saves_memory() -> None:
    arch = parse_architecture(PUBLISHED["Llama-3-8B"][0], source="8B")
    steps = ((PairLengths(512, 512, 512),) * 64,)
    planned = job(arch, Layout(tensor=2, data=4, sequence_parallel=True), cluster=H100, steps=steps)
    planned = replace(planned, tokens_per_microbatch=8192)
    block = Recompute(granularity="full", method="block", num_layers=8)
    ways = [Recompute(), Recompute(granularity="selective", modules=("mlp",)), FULL, block]
    *plans, partly = [make_plan(replace(planned, knobs=MemoryKnobs(recompute=way)), REHEARSALS) for way in ways]
    times = [plan.floor.compute for plan in plans if plan.floor is not None]
    assert times == sorted(set(times)) and times[2] / times[0] < 1.3
    sent = [plan.traffic.tensor for plan in plans]
    moved = (sent[0] * 2) // (14 * 32 + 6)  # the rows that a layer gathers or scatters once
    assert [(more - sent[0]) * 2 // moved for more in sent] == [0, 2 * 32, 4 * 32]
    # Eight of the 32 layers cost a quarter of all.
    assert partly.floor is not None
    assert partly.floor.compute - times[0] == pytest.approx((times[2] - times[0]) / 4)
    assert partly.traffic.tensor - sent[0] == (sent[2] - sent[0]) // 4
    assert [plan.fullest.activations for plan in plans] == sorted((p.fullest.activations for p in plans), reverse=True)


def test_the_longest_pair_decides_where_the_budget_does_not() -> None:
    planned = job(small(), Layout(tensor=2, sequence_parallel=True), tokens_per_microbatch=512)
    assert planned.widest_stream == 512
    assert replace(planned, longest_pair=701).widest_stream == 702
    assert replace(planned, steps=((PairLengths(40, 30, 20),) * 3,)).widest_stream == 270


def plan_words(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = plan_tool.main(list(words))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "set reference.mode=cached or offload"),
        (["precision.fp8=tensorwise"], "set reference.mode=offload"),  # kept log-probs are refused with it
        (["reference.mode=cached"], None),
        # The peak is in the policy's passes: what comes in for the reference's is not there then.
        (["reference.mode=offload", "data.tokens_per_microbatch=12288"], None),
    ],
)
def test_a_leaner_reference_is_proposed_where_it_helps(
    words: list[str], says: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("+model=llama3_8b", "parallel.tensor=1", "cluster.gpus=8", "cluster.gpu=h100", "cluster.memory_gib=20")
    status, _, err = plan_words(capsys, *given, *words)
    assert status == 2
    assert re.findall(r"set reference\.mode=[a-z ]*[a-z]", err) == ([] if says is None else [says])
    assert ("reference 15.0" in err) == (says is not None and "fp8" not in str(words))


def test_70b_on_64_h100_fits_and_on_16_it_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = plan_words(capsys, "+model=llama70b", "cluster.gpus=64", "cluster.gpu=h100")
    assert status == 0
    assert "70,553,706,496 parameters on 64 x h100: tp8 x pp4 x dp2, sequence parallel" in out
    assert "fits 79 GiB" in out and "limited by compute" in out and "assumed: prompts of 512" in out
    words = ("+model=llama70b", "parallel.pipeline=2", "cluster.gpus=16", "cluster.gpu=h100")
    status, out, err = plan_words(capsys, *words)
    assert status == 2 and "does not fit 79 GiB" in out
    assert "tp8 x pp2 x dp1 does not fit: a rank of stage 0 needs 11" in err and "the card (h100) has 79 GiB" in err
    assert "optimizer 49." in err and "take more than 16 cards" in err and "Traceback" not in err
    assert plan_words(capsys, *words, "cluster.memory_gib=120")[0] == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("precision.fp8=mxfp8",),
            "precision.fp8=mxfp8: needs a Blackwell card (compute capability 10.x), this one has 9",
        ),
        (
            ("precision.fp8=blockwise", "parallel.tensor=8", "model.shape.intermediate_size=14400"),
            "feed-forward features 1800",
        ),
    ],
)
def test_fp8_that_a_run_would_refuse_is_refused(
    words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = plan_words(capsys, *PLANNED, *words)
    assert status == 2 and says in err


def test_fp8_is_planned_as_it_is_computed(capsys: pytest.CaptureFixture[str]) -> None:
    def floor(*words: str) -> float:
        given = ("+model=llama3_8b", "cluster.gpus=16", "cluster.gpu=h100", "train.global_batch_size=640", *words)
        status, out, _ = plan_words(capsys, *given)
        assert status == 0, out
        found = re.search(r"floor of its time *│ ([\d.]+) s", out)
        assert found is not None
        said.append(" ".join(out.split()))
        return float(found[1])

    said: list[str] = []
    plain, quantised = floor(), floor("precision.fp8=tensorwise")
    some = floor("precision.fp8=tensorwise", "precision.num_layers_at_start_in_bf16=16")
    emulated = floor("precision.fp8=tensorwise", "precision.fp8_backend=emulate")
    assert quantised < some < plain == emulated
    assert ", FP8 tensorwise" in said[1] and "Memory takes layers that stay in bf16 for quantised ones" in said[2]
    assert "FP8 is emulated: planned as bf16, it is slower." in said[3]


def test_suggestions_fit_and_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["+model=qwen2_5_7b", "cluster.gpus=2", "cluster.gpu=b200"]
    status, out, _ = plan_words(capsys, *words, "--suggest")
    assert status == 0
    best = next(line for line in out.splitlines() if "parallel.tensor=" in line).partition(":")[2].split()
    config = compose_config([*words, *best], check=check_plan, dispensable={"data.train_path": []})
    assert config.parallel.tensor * config.parallel.pipeline <= 2
    status, _, err = plan_words(capsys, *words, "--suggest", "parallel.tensor=2")
    assert status == 2 and "parallel.tensor=2: has no effect with --suggest" in err
    status, _, err = plan_words(capsys, *words, "--suggest", "cluster.memory_gib=20")
    assert status == 2 and "none of the" in err and "layouts fits: take more cards" in err


def test_layouts_that_the_settings_allow_are_looked_at() -> None:
    uneven = ((PairLengths(60, 50, 40),) * 64, (PairLengths(60, 50, 40),) * 2)  # an epoch's last step is smaller
    planned = replace(job(small(), Layout(data=8), steps=uneven), cluster=H100)
    assert max(layout.data for layout in layouts_of(planned)) == 8
    padded = MemoryKnobs(fp8="mxfp8", padded_for="mxfp8", layers_in_bf16=(0, 3))
    quantised = replace(planned, knobs=padded, tokens_per_microbatch=4032)
    wide = small(hidden_size=512, intermediate_size=512)
    found = list(layouts_of(replace(quantised, arch=wide, reference=wide)))
    assert {layout.tensor for layout in found} == {1, 2}  # 4032 is no multiple of 4 · 32
    assert {layout.pipeline for layout in found} == {1, 2}  # of 8 layers, a stage of 4 has no 3 to spare


def test_a_small_reference_leaves_room() -> None:
    arch, reference = small(num_hidden_layers=64, vocab_size=64), small(num_hidden_layers=8, vocab_size=64)
    cluster = replace(H100, memory_gib=None)
    planned = replace(job(arch, Layout(), cluster=cluster), reference=reference)
    needed = make_plan(planned, REHEARSALS).fullest
    tight = replace(planned, cluster=replace(cluster, memory_gib=(needed.total + 2**10) / 2**30))
    assert suggest(tight, [Recompute()]).plans


def test_every_layout_that_the_model_can_be_cut_into_is_looked_at() -> None:
    steps = ((PairLengths(600, 500, 400),) * 64,)
    planned = job(small(), Layout(data=4), steps=steps, tokens_per_microbatch=4096)
    planned = replace(planned, cluster=replace(H100, gpus_per_node=2))
    found = {(item.tensor, item.pipeline, item.virtual_pipeline, item.data) for item in layouts_of(planned)}
    assert (2, 2, 4, 1) in found and (1, 4, 2, 1) in found and (1, 1, 1, 4) in found
    assert not any(tensor > 2 or 8 % (pipeline * chunks) for tensor, pipeline, chunks, _ in found)
    choices = [Recompute(), FULL]
    tight = replace(planned, cluster=replace(planned.cluster, memory_gib=2.05))
    ranked = suggest(tight, choices).plans
    assert ranked and all(plan.fits for plan in ranked)
    assert {plan.job.knobs.recompute.granularity for plan in ranked} == {None, "full"}
    full = next(plan for plan in ranked if plan.job.knobs.recompute.granularity)
    assert "model.recompute_granularity=full" in overrides(full)
    assert not make_plan(replace(full.job, knobs=MemoryKnobs())).fits


# Cards and words


def test_cards_are_found_by_the_name_that_cuda_gives() -> None:
    assert find_gpu("NVIDIA H100 80GB HBM3") == ("h100", GPUS["h100"])
    assert find_gpu("NVIDIA H200 NVL") == ("h200_nvl", GPUS["h200_nvl"])
    assert find_gpu("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert find_gpu("Tesla T4") is None
    assert GPUS["l40s"].compute_capability == (8, 9)
    assert GPUS["gb200"].bf16_tflops == 2500.0 and GPUS["a100"].fp8_tflops is None


PLANNED = ("+model=llama3_8b", "cluster.gpus=8", "cluster.gpu=h100")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("+model=llama3_8b",), "cluster.gpus=null: the number of cards is needed: add cluster.gpus=N"),
        (("+model=llama3_8b", "cluster.gpus=8"), "cluster.gpu=null: the kind of card is needed: add cluster.gpu=NAME"),
        (("+model=llama3_8b", "cluster.gpus=8", "cluster.gpu=x1"), "cluster.gpu=x1: must be one of gb200, b200"),
        ((*PLANNED, "parallel.tensor=3"), "must divide the world size 8"),
        (
            ("+model=llama3_8b", "cluster.gpus=8", "cluster.memory_gib=80", "cluster.network_gb_per_s=3"),
            "=null, of which no",
        ),
        ((*PLANNED, "train.dry_run=true"), "train.dry_run=true: has no effect here"),
        ((*PLANNED, "plan.prompt_tokens=2000"), "prompt and response are 2512 tokens, data.max_length=2048 keeps"),
        ((*PLANNED, "data.train_path=setup.py"), "the data are read with its tokenizer: give model.hf_path=DIR"),
        (("+model=hf", "cluster.gpus=8", "cluster.gpu=h100"), "the model's shape is needed"),
        (
            (*PLANNED, "data.train_path=setup.py", "plan.response_tokens=9"),
            "plan.response_tokens=9: has no effect with data.train_path",
        ),
        (
            (
                "+model=llama3_8b",
                "cluster.gpus=8",
                "cluster.gpu=x1",
                "cluster.memory_gib=9",
                "cluster.network_gb_per_s=1",
            ),
            "cluster.network_gb_per_s=1.0: has no effect with cluster.gpu=x1",
        ),
    ],
)
def test_what_a_plan_lacks_is_said(words: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config(words, check=check_plan, dispensable={"data.train_path": []})
    assert says in str(caught.value)
