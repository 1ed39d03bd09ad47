"""Weights between Hugging Face and Megatron: slices, whole tensors, files, and a model over several processes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megadpo.errors import ConversionError
from megadpo.models.conversion.load_save import copy_hf_side_files, export_hf_weights, load_hf_weights
from megadpo.models.conversion.mapping import (
    ShardPlan,
    exported_names,
    fill_shard,
    hf_shapes,
    merge_shards,
    shard_plans,
)
from megadpo.models.conversion.safetensors_io import SafetensorsReader, ShardedWriter
from megadpo.models.hf_config import Architecture, read_architecture
from megadpo.parallel.state import ParallelState
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


# ---------------------------------------------------------------------------------------------------------------- files


def test_reader_reads_headers_and_slices(models: dict[str, Path]) -> None:
    for family, files in (("llama", 1), ("qwen2", 5)):
        hf = read_all(models[family])
        with SafetensorsReader(models[family]) as reader:
            assert {name: header.shape for name, header in reader.headers.items()} == {
                name: tuple(tensor.shape) for name, tensor in hf.items()
            }
            assert len({header.file for header in reader.headers.values()}) >= files
            name = "model.layers.1.mlp.down_proj.weight"
            assert torch.equal(reader.read(name), hf[name])
            assert torch.equal(reader.read(name, (slice(3, 9),)), hf[name][3:9])
            assert torch.equal(reader.read(name, (slice(None), slice(5, 70))), hf[name][:, 5:70])


def write_sharded(directory: Path, weight_map: dict[str, str] | None = None) -> None:
    directory.mkdir(exist_ok=True)
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, directory / "one.safetensors")
    save_file({"c": torch.ones(2)}, directory / "two.safetensors")
    index = {"weight_map": weight_map or {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_reader_names_what_is_wrong(tmp_path: Path) -> None:
    write_sharded(tmp_path / "good")
    assert set(SafetensorsReader(tmp_path / "good").headers) == {"a", "b", "c"}
    cases: list[tuple[str, Any, str]] = [
        ("missing", lambda d: (d / "two.safetensors").unlink(), "two.safetensors does not exist"),
        ("truncated", lambda d: (d / "two.safetensors").write_bytes(b"\x10\0\0"), "two.safetensors cannot be read"),
        (
            "lying",
            lambda d: write_sharded(d, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}),
            "b is in one.safetensors, the index says two.safetensors",
        ),
        (
            "inventing",
            lambda d: write_sharded(d, dict.fromkeys("abd", "one.safetensors") | {"c": "two.safetensors"}),
            "d is not in one.safetensors",
        ),
        (
            "forgetting",
            lambda d: write_sharded(d, {"a": "one.safetensors", "c": "two.safetensors"}),
            "b in one.safetensors is not in the index",
        ),
        (
            "twice",
            lambda d: save_file({"c": torch.ones(2), "a": torch.ones(2)}, d / "two.safetensors"),
            "a lies in both one.safetensors and two.safetensors",
        ),
        ("both", lambda d: save_file({"a": torch.ones(2)}, d / "model.safetensors"), "remove the one that is stale"),
        ("broken", lambda d: (d / "model.safetensors.index.json").write_text("{\n!"), ":2: not JSON"),
        ("mapless", lambda d: (d / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
    ]
    for name, spoil, message in cases:
        write_sharded(tmp_path / name)
        spoil(tmp_path / name)
        with pytest.raises(ConversionError) as caught:
            SafetensorsReader(tmp_path / name)
        assert message in str(caught.value)
    (tmp_path / "old").mkdir()
    with pytest.raises(ConversionError, match="holds neither"):
        SafetensorsReader(tmp_path / "old")
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConversionError, match=r"\.bin weights only.*\n.*save_pretrained"):
        SafetensorsReader(tmp_path / "old")


def test_writer_splits_and_transformers_reads(tmp_path: Path, models: dict[str, Path]) -> None:
    hf = read_all(models["llama"])
    for name, limit, files in (("one", 10**9, ["model.safetensors"]), ("many", 110_000, None)):
        out = tmp_path / name
        with ShardedWriter(out, max_shard_bytes=limit) as writer:
            for tensor_name, tensor in hf.items():
                writer.add(tensor_name, tensor)
            assert not list(out.glob("*.safetensors*"))
        copy_hf_side_files(models["llama"], out, dtype=torch.float32)
        names = sorted(path.name for path in out.glob("*.safetensors"))
        assert not list(out.glob(".*"))
        assert files is None or names == files
        if files is None:
            assert names[0] == f"model-00001-of-{len(names):05d}.safetensors" and len(names) > 3
            assert all(sum(t.nbytes for t in load_file(out / n).values()) <= limit for n in names)
        state = AutoModelForCausalLM.from_pretrained(out).state_dict()
        assert all(torch.equal(state[tensor_name], tensor) for tensor_name, tensor in hf.items())
        with pytest.raises(ConversionError, match="already holds model"):
            ShardedWriter(out)


def write_and_fail(directory: Path) -> None:
    with ShardedWriter(directory, max_shard_bytes=8) as writer:
        for name in "abc":
            writer.add(name, torch.ones(2))
        raise KeyboardInterrupt


def test_killed_export_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(tmp_path)
    assert not list(tmp_path.iterdir())
    killed = ShardedWriter(tmp_path, max_shard_bytes=8)
    killed.add("a", torch.ones(2))
    killed.add("b", torch.ones(2))
    assert not list(tmp_path.glob("*.safetensors*"))
    with ShardedWriter(tmp_path) as writer:
        writer.add("c", torch.ones(2))
        with pytest.raises(ConversionError, match="c was written twice"):
            writer.add("c", torch.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_side_files_are_copied_byte_for_byte(tmp_path: Path, models: dict[str, Path]) -> None:
    copy_hf_side_files(models["llama"], tmp_path / "same", dtype=torch.float32)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "same" / name).read_bytes() == (models["llama"] / name).read_bytes()
    assert (tmp_path / "same" / "chat_template.jinja").read_text() == (
        models["llama"] / "chat_template.jinja"
    ).read_text()
    assert not list((tmp_path / "same").glob("*.safetensors"))
    copy_hf_side_files(models["llama"], tmp_path / "other", dtype=torch.bfloat16)
    original, changed = ((d / "config.json").read_text() for d in (models["llama"], tmp_path / "other"))
    assert changed == original.replace('"dtype": "float32"', '"dtype": "bfloat16"') != original
    with pytest.raises(ConversionError, match=r"config\.json does not exist"):
        copy_hf_side_files(tmp_path, tmp_path / "x", dtype=torch.float32)


# ----------------------------------------------------------------------------------------------------------- the model


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
        load_hf_weights([one_rank_chunk(arch)], arch, spoiled, tp_rank=0, tp_size=1)
    message = str(caught.value)
    assert "5 weights" in message
    for text in (
        "layers.1.self_attn.k_proj.weight is missing",
        "layers.2.mlp.up_proj.weight has shape [3, 64], the configuration asks for [128, 64]",
        "layers.4.mlp.up_proj.weight [128, 64] has no place",
        "layers.0.self_attn.q_proj.bias [96] has no place",
        "model.norm.weight has dtype I8",
    ):
        assert text in message


def test_rotary_buffers_of_old_checkpoints_are_ignored(tmp_path: Path, models: dict[str, Path]) -> None:
    arch, buffer = read_architecture(models["llama"]), torch.zeros(12)
    old = write_changed(models["llama"], tmp_path / "old", {"model.layers.3.self_attn.rotary_emb.inv_freq": buffer})
    chunk = one_rank_chunk(arch)
    load_hf_weights([chunk], arch, old, tp_rank=0, tp_size=1)
    assert not any(parameter.isnan().any() for parameter in chunk.parameters())


def test_head_beside_tied_embeddings_must_be_equal(tmp_path: Path, models: dict[str, Path]) -> None:
    arch = read_architecture(models["qwen2"])
    head = read_all(models["qwen2"])["model.embed_tokens.weight"].clone()
    equal = write_changed(models["qwen2"], tmp_path / "equal", {"lm_head.weight": head})
    load_hf_weights([one_rank_chunk(arch)], arch, equal, tp_rank=0, tp_size=1)
    head[400, 63] += 1e-3
    other = write_changed(models["qwen2"], tmp_path / "other", {"lm_head.weight": head})
    with pytest.raises(ConversionError, match="tie_word_embeddings to false"):
        load_hf_weights([one_rank_chunk(arch)], arch, other, tp_rank=0, tp_size=1)


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
    load_hf_weights(chunks, arch, directory, tp_rank=state.tensor_rank, tp_size=state.tensor_size)
    export_hf_weights(chunks, arch, root / "half", state=state, dtype=torch.float16)
    with pytest.raises(ConversionError, match="already holds model"):
        export_hf_weights(chunks, arch, root / "half", state=state)
    if state.pipeline_rank == 1:
        del chunks[0].get_submodule("decoder.final_layernorm").weight
    with pytest.raises(ConversionError, match=r"final_layernorm\.weight is on stages \[\] instead of one"):
        export_hf_weights(chunks, arch, root / "incomplete", state=state)


def test_hf_to_megatron_to_hf_is_bit_equal_in_every_layout(tmp_path: Path, models: dict[str, Path]) -> None:
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
