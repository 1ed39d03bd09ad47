"""Weights between Hugging Face and Megatron: slices, whole tensors, files, and a model over several processes."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from megadpo.errors import ConversionError
from megadpo.models.conversion.export import export_model
from megadpo.models.conversion.load_save import (
    check_hf_weights,
    export_hf_weights,
    load_hf_weights,
)
from megadpo.models.conversion.mapping import (
    ShardPlan,
    exported_names,
    fill_shard,
    hf_shapes,
    merge_shards,
    shard_plans,
)
from megadpo.models.conversion.side_files import read_side_files
from megadpo.models.hf_config import Architecture, read_architecture
from megadpo.runtime.parallel_state import ParallelState
from tests.helpers.no_room import largest_file
from tests.helpers.safetensors_files import write_safetensors
from tests.helpers.tiny_models import FAMILIES, write_tiny_model

LAYERS = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each family; qwen2 is tied and in several files, head_dim isn't hidden / heads."""
    root = tmp_path_factory.mktemp("models")
    return {
        family: write_tiny_model(
            root / family,
            family,
            num_layers=LAYERS,
            head_dim=24,
            max_shard_size="200KB" if family == "qwen2" else "5GB",
        )
        for family in FAMILIES
    }


@pytest.fixture
def world_of_one() -> Iterator[None]:
    """Process groups of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


class StandIn(torch.nn.Module):
    """The parameters of one chunk of a Megatron GPTModel: NaN until loaded, named by the layer's place in the chunk."""

    def __init__(self, plans: Mapping[str, ShardPlan], layers: range, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, plan in plans.items():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                if int(parts[2]) not in layers:
                    continue
                parts[2] = str(int(parts[2]) - layers.start)
            module: torch.nn.Module = self
            for part in parts[:-1]:
                if part not in dict(module.named_children()):
                    module.add_module(part, torch.nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(parts[-1], torch.nn.Parameter(torch.full(plan.shape, float("nan"), dtype=dtype)))
        for layer in layers:
            self.get_submodule(f"decoder.layers.{layer - layers.start}").layer_number = layer + 1  # type: ignore[assignment]


def stand_in_chunks(arch: Architecture, state: ParallelState, dtype: torch.dtype = torch.float32) -> list[StandIn]:
    """This rank's chunks, laid out as Megatron does: chunk c of stage p comes after chunk c of stage p - 1."""
    plans = shard_plans(arch, tp_rank=state.tensor_rank, tp_size=state.tensor_size)
    count = state.pipeline_size * state.virtual_pipeline_size
    chunks = []
    for chunk in range(state.virtual_pipeline_size):
        position = chunk * state.pipeline_size + state.pipeline_rank
        left_out = set()
        if position != 0:
            left_out |= {"embedding.word_embeddings.weight"}
        if position != count - 1:
            left_out |= {"decoder.final_layernorm.weight", "output_layer.weight"}
        elif count == 1 and arch.tied_embeddings:
            left_out |= {"output_layer.weight"}
        layers = range(position * LAYERS // count, (position + 1) * LAYERS // count)
        chunks.append(StandIn({n: plan for n, plan in plans.items() if n not in left_out}, layers, dtype=dtype))
    return chunks


def megatron_weights(arch: Architecture, hf: Mapping[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    """One layer's unsharded Megatron parameters, put together by reshaping whole tensors."""
    attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
    groups = arch.num_query_groups

    def grouped(suffix: str) -> torch.Tensor:
        parts = [hf[f"{attention}{x}_proj.{suffix}"] for x in "qkv"]
        return torch.cat([part.reshape(groups, -1, *part.shape[1:]) for part in parts], dim=1).flatten(0, 1)

    weights = {
        "self_attention.linear_qkv.weight": grouped("weight"),
        "self_attention.linear_proj.weight": hf[f"{attention}o_proj.weight"],
        "mlp.linear_fc2.weight": hf[f"{mlp}down_proj.weight"],
        "input_layernorm.weight": hf[f"model.layers.{layer}.input_layernorm.weight"],
        "pre_mlp_layernorm.weight": hf[f"model.layers.{layer}.post_attention_layernorm.weight"],
    }
    if arch.qkv_bias:
        weights["self_attention.linear_qkv.bias"] = grouped("bias")
    if arch.qk_norm:
        weights["self_attention.q_layernorm.weight"] = hf[f"{attention}q_norm.weight"]
        weights["self_attention.k_layernorm.weight"] = hf[f"{attention}k_norm.weight"]
    return weights


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_shards_are_megatrons(models: dict[str, Path], family: str, tp_size: int) -> None:
    arch, hf = read_architecture(models[family]), read_all(models[family])
    for rank in range(tp_size):
        shards = {}
        for name, plan in shard_plans(arch, tp_rank=rank, tp_size=tp_size).items():
            shards[name] = torch.full(plan.shape, float("nan"))
            fill_shard(plan, lambda hf_name, slices: hf[hf_name][slices], shards[name])
        prefix = f"decoder.layers.{LAYERS - 1}."
        for name, whole in megatron_weights(arch, hf, LAYERS - 1).items():
            dim = 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0
            expected = whole if "layernorm" in name else whole.chunk(tp_size, dim)[rank]
            assert torch.equal(shards.pop(prefix + name), expected), name
        gate, up = (hf[f"model.layers.{LAYERS - 1}.mlp.{x}_proj.weight"].chunk(tp_size)[rank] for x in ("gate", "up"))
        assert torch.equal(shards.pop(prefix + "mlp.linear_fc1.weight"), torch.cat([gate, up]))
        assert not [name for name in shards if name.startswith(prefix)]
        embedding = hf["model.embed_tokens.weight"]
        head = embedding if arch.tied_embeddings else hf["lm_head.weight"]
        for name, table in (("embedding.word_embeddings.weight", embedding), ("output_layer.weight", head)):
            padded = torch.cat([table, torch.zeros(512 - 401, 64)])
            assert torch.equal(shards[name], padded.chunk(tp_size)[rank])
        assert torch.equal(shards["decoder.final_layernorm.weight"], hf["model.norm.weight"])


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bit_equal_and_reads_slices_only(models: dict[str, Path], family: str, tp_size: int) -> None:
    arch, hf = read_architecture(models[family]), read_all(models[family])
    ranks = [shard_plans(arch, tp_rank=rank, tp_size=tp_size) for rank in range(tp_size)]
    back: dict[str, torch.Tensor] = {}
    elements: Counter[str] = Counter()

    def read(hf_name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        piece = hf[hf_name][slices]
        elements[hf_name] += piece.numel()
        return piece

    for name in exported_names(arch):
        plans = [by_name[name] for by_name in ranks]
        shards = [torch.full(plan.shape, float("nan")) for plan in plans]
        for plan, shard in zip(plans, shards, strict=True):
            fill_shard(plan, read, shard)
        back |= merge_shards(plans, shards)
    assert back.keys() == hf.keys() == hf_shapes(arch).keys()
    for name, tensor in hf.items():
        assert torch.equal(back[name], tensor), name
        # All ranks together read a split tensor once; a norm is read by each.
        assert elements[name] == tensor.numel() * (tp_size if "norm" in name else 1), name


def test_rank_of_padding_rows_only(tmp_path: Path) -> None:
    arch = read_architecture(write_tiny_model(tmp_path, "llama", vocab_size=300, num_layers=1, heads=8, kv_heads=8))
    plan = shard_plans(arch, tp_rank=7, tp_size=8)["output_layer.weight"]
    shard = torch.full(plan.shape, float("nan"))
    fill_shard(plan, lambda *_: pytest.fail("read rows that don't exist"), shard)
    assert plan.shape == (48, 64) and not shard.any()


def test_layouts_that_do_not_divide_are_refused(models: dict[str, Path]) -> None:
    arch = read_architecture(models["llama"])
    with pytest.raises(ConversionError, match=r"num_attention_heads \(4\).*ffn_hidden_size.*num_query_groups \(2\)"):
        shard_plans(arch, tp_rank=0, tp_size=3)


def test_fill_shard_names_a_wrong_shape(models: dict[str, Path]) -> None:
    plan = shard_plans(read_architecture(models["llama"]), tp_rank=0, tp_size=2)["output_layer.weight"]
    with pytest.raises(ConversionError, match=r"output_layer.weight has shape \[512, 64\].*\[256, 64\]"):
        fill_shard(plan, lambda *_: torch.zeros(256, 64), torch.zeros(512, 64))


def one_rank_chunk(arch: Architecture) -> StandIn:
    plans = shard_plans(arch, tp_rank=0, tp_size=1)
    if arch.tied_embeddings:
        plans.pop("output_layer.weight")
    return StandIn(plans, range(LAYERS))


def write_changed(source: Path, out: Path, changes: dict[str, torch.Tensor | None]) -> Path:
    weights = read_all(source) | changes
    out.mkdir()
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, out / "model.safetensors")
    return out


def test_all_unfitting_weights_are_named_at_once(tmp_path: Path, models: dict[str, Path]) -> None:
    arch = read_architecture(models["llama"])
    spoiled = write_changed(
        models["llama"],
        tmp_path / "spoiled",
        {
            "model.layers.1.self_attn.k_proj.weight": None,
            "model.layers.2.mlp.up_proj.weight": torch.zeros(3, 64),
            "model.layers.4.mlp.up_proj.weight": torch.zeros(128, 64),
            "model.layers.0.self_attn.q_proj.bias": torch.zeros(96),
            "model.norm.weight": torch.zeros(64, dtype=torch.int8),
        },
    )
    with pytest.raises(ConversionError) as caught:
        check_hf_weights(arch, spoiled)
    message = str(caught.value)
    with pytest.raises(ConversionError) as on_loading:
        load_hf_weights([one_rank_chunk(arch)], arch, spoiled, tp_rank=0, tp_size=1)
    assert str(on_loading.value) == message
    assert "5 weights" in message
    for text in (
        "layers.1.self_attn.k_proj.weight is missing",
        "layers.2.mlp.up_proj.weight has shape [3, 64], the configuration asks for [128, 64]",
        "layers.4.mlp.up_proj.weight [128, 64] has no place",
        "layers.0.self_attn.q_proj.bias [96] has no place",
        "model.norm.weight has dtype I8",
    ):
        assert text in message


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_by_headers_passes_whole_models(family: str, models: dict[str, Path]) -> None:
    check_hf_weights(read_architecture(models[family]), models[family])


@pytest.mark.usefixtures("world_of_one")
def test_several_files_of_mixed_dtypes_load_and_rounding_is_told(
    tmp_path: Path, models: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    arch, weights = read_architecture(models["llama"]), read_all(models["llama"])
    stored = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    mixed = {name: tensor.to(stored[number % 4]) for number, (name, tensor) in enumerate(weights.items())}
    write_safetensors(tmp_path / "mixed", mixed, max_shard_bytes=60_000)
    assert len(list((tmp_path / "mixed").glob("*.safetensors"))) > 5
    plans = shard_plans(arch, tp_rank=0, tp_size=1)
    for dtype, rounded, formats in ((torch.float32, [3], "F64"), (torch.bfloat16, [0, 2, 3], "F16, F32, F64")):
        caplog.clear()
        chunk = StandIn(plans, range(LAYERS), dtype=dtype)
        with caplog.at_level(logging.WARNING):
            load_hf_weights([chunk], arch, tmp_path / "mixed", tp_rank=0, tp_size=1)
        for name, expected in (("output_layer", "lm_head"), ("decoder.final_layernorm", "model.norm")):
            assert torch.equal(chunk.get_parameter(f"{name}.weight")[:64], mixed[f"{expected}.weight"][:64].to(dtype))
        count = sum(number % 4 in rounded for number in range(len(mixed)))
        (line,) = [record.getMessage() for record in caplog.records]
        told = f"{count} of {len(mixed)} tensors are stored as {formats} and are rounded to {dtype}"
        assert line == f"{tmp_path / 'mixed'}: {told.replace('torch.', '')}"


@pytest.mark.usefixtures("world_of_one")
def test_rotary_buffers_of_old_checkpoints_are_ignored(tmp_path: Path, models: dict[str, Path]) -> None:
    arch, buffer = read_architecture(models["llama"]), torch.zeros(12)
    old = write_changed(models["llama"], tmp_path / "old", {"model.layers.3.self_attn.rotary_emb.inv_freq": buffer})
    chunk = one_rank_chunk(arch)
    load_hf_weights([chunk], arch, old, tp_rank=0, tp_size=1)
    assert not any(parameter.isnan().any() for parameter in chunk.parameters())


@pytest.mark.usefixtures("world_of_one")
def test_head_beside_tied_embeddings_must_be_equal(tmp_path: Path, models: dict[str, Path]) -> None:
    arch = read_architecture(models["qwen2"])
    head = read_all(models["qwen2"])["model.embed_tokens.weight"].clone()
    equal = write_changed(models["qwen2"], tmp_path / "equal", {"lm_head.weight": head})
    load_hf_weights([one_rank_chunk(arch)], arch, equal, tp_rank=0, tp_size=1)
    head[400, 63] += 1e-3
    other = write_changed(models["qwen2"], tmp_path / "other", {"lm_head.weight": head})
    with pytest.raises(ConversionError, match="tie_word_embeddings to false"):
        load_hf_weights([one_rank_chunk(arch)], arch, other, tp_rank=0, tp_size=1)


def test_thousands_of_missing_weights_are_counted(tmp_path: Path, models: dict[str, Path]) -> None:
    arch = replace(read_architecture(models["llama"]), num_layers=200)
    with pytest.raises(ConversionError) as caught:
        check_hf_weights(arch, models["llama"])
    first, *lines = str(caught.value).splitlines()
    missing = 9 * (200 - LAYERS)
    assert f"{missing} weights don't fit" in first
    assert (len(lines), lines[-1]) == (51, f"  and {missing - 50} more")


def test_parameter_without_a_row_is_named(models: dict[str, Path]) -> None:
    arch = read_architecture(models["llama"])
    chunk = one_rank_chunk(arch)
    chunk.get_submodule("decoder").register_parameter("adapter", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(ConversionError, match=r"decoder\.adapter has no row in the table of family llama"):
        load_hf_weights([chunk], arch, models["llama"], tp_rank=0, tp_size=1)


# Family, tensor, pipeline, virtual pipeline, parameter dtype; four ranks, the rest of them data-parallel.
LAYOUTS = [
    ("qwen3", 2, 2, 1, torch.float32),
    ("qwen2", 2, 2, 2, torch.float32),
    ("qwen2", 1, 4, 1, torch.float32),
    ("llama", 4, 1, 1, torch.float32),
    ("llama", 1, 2, 2, torch.bfloat16),
]
WORLD = 4


def layout_state(rank: int, tensor: int, pipeline: int, virtual: int) -> ParallelState:
    """Megatron's order of ranks: tensor fastest, then data, then pipeline."""
    data = WORLD // (tensor * pipeline)
    grid = torch.arange(WORLD).view(pipeline, data, tensor)

    def group_of(lists: torch.Tensor) -> dist.ProcessGroup:
        group, _ = dist.new_subgroups_by_enumeration(lists.tolist())
        return group

    return ParallelState(
        tensor_rank=rank % tensor,
        tensor_size=tensor,
        pipeline_rank=rank // (tensor * data),
        pipeline_size=pipeline,
        virtual_pipeline_size=virtual,
        data_rank=rank // tensor % data,
        data_size=data,
        tensor_group=group_of(grid.reshape(-1, tensor)),
        pipeline_group=group_of(grid.permute(1, 2, 0).reshape(-1, pipeline)),
    )


def round_trips(rank: int, root: Path, models: dict[str, Path]) -> None:
    """What each process does: a model in every layout from its directory to another, then what must be refused."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root}/rendezvous", rank=rank, world_size=WORLD)
    for number, (family, tensor, pipeline, virtual, dtype) in enumerate(LAYOUTS):
        state, arch = layout_state(rank, tensor, pipeline, virtual), read_architecture(models[family])
        chunks = stand_in_chunks(arch, state, dtype)
        load_hf_weights(chunks, arch, models[family], tp_rank=state.tensor_rank, tp_size=state.tensor_size)
        assert not any(parameter.isnan().any() for chunk in chunks for parameter in chunk.parameters())
        if arch.tied_embeddings and pipeline > 1 and state.is_last_stage:
            rows = arch.padded_vocab_size(tensor) // tensor
            table = read_all(models[family])["model.embed_tokens.weight"][rows * state.tensor_rank :][:rows]
            assert torch.equal(chunks[-1].get_parameter("output_layer.weight")[: len(table)], table)
        if state.data_rank != 0:
            # Only the first replica may be written.
            for parameter in [p for chunk in chunks for p in chunk.parameters()]:
                parameter.data.fill_(7)
        export_hf_weights(chunks, arch, root / str(number), state=state, max_shard_bytes=300_000)
        assert (root / str(number) / "model.safetensors.index.json").exists(), "returned before the files were complete"
    refusals(root, models["llama"], layout_state(rank, 2, 2, 1))
    dist.destroy_process_group()


def refusals(root: Path, directory: Path, state: ParallelState) -> None:
    arch = read_architecture(directory)
    chunks = stand_in_chunks(arch, state)
    with pytest.raises(ConversionError) as caught:
        load_hf_weights(chunks, arch, root / "poisoned", tp_rank=state.tensor_rank, tp_size=state.tensor_size)
    # Each lies in the slice of one rank; every rank names both.
    assert sorted(str(caught.value).splitlines()[1:]) == [
        "  model.embed_tokens.weight holds NaN or infinite values",
        "  model.layers.3.mlp.down_proj.weight holds NaN or infinite values",
    ]
    half = stand_in_chunks(arch, state, dtype=torch.float16)
    with pytest.raises(ConversionError, match=r"q_proj\.weight holds values beyond the range of torch\.float16"):
        load_hf_weights(half, arch, root / "large", tp_rank=state.tensor_rank, tp_size=state.tensor_size)
    load_hf_weights(chunks, arch, directory, tp_rank=state.tensor_rank, tp_size=state.tensor_size)
    export_hf_weights(chunks, arch, root / "half", state=state, dtype=torch.float16)
    with pytest.raises(ConversionError, match="already holds model"):
        export_hf_weights(chunks, arch, root / "half", state=state)
    no_room = r"full/\.export\.partial/0\.safetensors: can't be written .*: make room, or"
    for limit in (300_000, 10**9):  # found in the middle, and with the last file
        with largest_file(2**16), pytest.raises(ConversionError, match=no_room):
            export_hf_weights(chunks, arch, root / "full", state=state, max_shard_bytes=limit)
    occupied = r"occupied can't be made \(Directory not empty\): the complete model is in .*/\.occupied\.partial: move"
    with pytest.raises(ConversionError, match=occupied):
        export_model(
            chunks,
            arch,
            read_side_files(directory),
            root / "occupied",
            state=state,
            dtype=torch.float32,
            card="",
        )
    if state.pipeline_rank == 1:
        del chunks[0].get_submodule("decoder.final_layernorm").weight
    with pytest.raises(ConversionError, match=r"final_layernorm\.weight is on stages \[\] instead of one"):
        export_hf_weights(chunks, arch, root / "incomplete", state=state)


def test_hf_to_megatron_to_hf_is_bit_equal_in_every_layout(tmp_path: Path, models: dict[str, Path]) -> None:
    poisoned = read_all(models["llama"])
    poisoned["model.layers.3.mlp.down_proj.weight"][5, -1] = float("inf")
    poisoned["model.embed_tokens.weight"][0, 0] = float("nan")
    write_changed(models["llama"], tmp_path / "poisoned", poisoned)
    large = read_all(models["llama"])
    large["model.layers.0.self_attn.q_proj.weight"][0, 0] = 1e6
    write_changed(models["llama"], tmp_path / "large", large)
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "precious").touch()
    # Forked from a process that has imported the slow things once.
    slow = ["megadpo.models.conversion.load_save", "tests.helpers.tiny_models", "pytest", "transformers.models.auto"]
    mp.get_context("forkserver").set_forkserver_preload(slow)
    mp.start_processes(round_trips, (tmp_path, models), nprocs=WORLD, start_method="forkserver")
    for number, (family, *_, dtype) in enumerate(LAYOUTS):
        expected, found = read_all(models[family]), read_all(tmp_path / str(number))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == dtype and torch.equal(found[name], tensor.to(dtype)), name
    half = read_all(tmp_path / "half")
    assert all(torch.equal(half[name], tensor.half()) for name, tensor in read_all(models["llama"]).items())
    assert not (tmp_path / "incomplete").exists()
    assert list((tmp_path / "full").iterdir()) == []
    assert [path.name for path in (tmp_path / "occupied").iterdir()] == ["precious"]
    assert read_all(tmp_path / ".occupied.partial").keys() == read_all(models["llama"]).keys()
