"""Weights box by box: names and shapes, blocks, threads, a comparison bit by bit, and errors of writers' threads."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed.checkpoint import CheckpointException

from megadpo.errors import ConversionError
from megadpo.models.conversion import stored
from megadpo.models.conversion.compare import WeightDifference, different_weights, sum_up
from megadpo.models.conversion.dcp import BoxReader, LazyBox, save_lazily
from megadpo.models.conversion.mapping import cut_rows, fill_shard, shard_plans
from megadpo.models.conversion.stored import Box, HFBlock, stored_parameters, stored_problems
from megadpo.models.conversion.streaming import Worker, for_each_stored_block, store_hf_weights
from megadpo.models.conversion.threads import ByteBudget, in_threads, split_evenly
from megadpo.models.hf_config import read_architecture
from tests.helpers.no_room import largest_file
from tests.helpers.safetensors_files import write_safetensors
from tests.helpers.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "model", "qwen2", heads=6, kv_heads=2, head_dim=24)


@pytest.fixture
def world_of_one() -> Iterator[None]:
    """Process groups of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Told:
    """A worker of three threads that remembers what it was told."""

    def __init__(self) -> None:
        self.total, self.done = 0, 0
        self.worker = Worker(rank=0, world_size=1, threads=3, begin=self._begin, advance=self._advance)
        self._lock = threading.Lock()

    def _begin(self, total: int) -> None:
        self.total = total

    def _advance(self, count: int) -> None:
        with self._lock:
            self.done += count


def stored_in_small_blocks(model: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> BoxReader:
    """The model's weights as a checkpoint of boxes that begin anywhere."""
    monkeypatch.setattr(stored, "_BLOCK_VALUES", 1000)
    told = Told()
    store_hf_weights(read_architecture(model), model, directory, dtype=torch.float32, worker=told.worker)
    assert told.done == told.total > 0
    return BoxReader(directory)


@given(first=st.integers(0, 300), rows=st.integers(1, 300))
def test_rows_of_a_plan_are_rows_of_the_shard(model: Path, first: int, rows: int) -> None:
    arch, hf = read_architecture(model), load_file(model / "model.safetensors")
    plans = shard_plans(arch, tp_rank=0, tp_size=1)
    for name in ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias", "mlp.linear_fc1.weight"):
        plan = plans[f"decoder.layers.1.{name}"]
        whole = torch.empty(plan.shape)
        fill_shard(plan, lambda hf_name, slices: hf[hf_name][slices], whole)
        stop = min(first + rows, plan.shape[0])
        if first < stop:
            part = torch.empty((stop - first, *plan.shape[1:]))
            fill_shard(cut_rows(plan, first, stop), lambda hf_name, slices: hf[hf_name][slices], part)
            assert torch.equal(part, whole[first:stop])


@pytest.mark.usefixtures("world_of_one")
def test_blocks_make_up_all_tensors_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = stored_in_small_blocks(model, tmp_path, monkeypatch)
    monkeypatch.setattr(stored, "_BLOCK_VALUES", 700)  # smaller than the boxes
    hf = load_file(model / "model.safetensors")
    seen: Counter[str] = Counter()
    threads = set()

    def look(block: HFBlock) -> None:
        assert torch.equal(block.values, hf[block.name][block.slices])
        seen[block.name] += block.values.numel()
        threads.add(threading.get_ident())

    told = Told()
    for_each_stored_block(read_architecture(model), reader, look, worker=told.worker)
    assert seen == {name: tensor.numel() for name, tensor in hf.items()}
    assert len(threads) == 3
    assert told.done == told.total > 0


@pytest.mark.usefixtures("world_of_one")
def test_weights_are_compared_bit_by_bit_a_head_beside_tied_embeddings_too(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch, weights = read_architecture(model), load_file(model / "model.safetensors")
    norm, head = weights["model.norm.weight"], weights["model.embed_tokens.weight"].clone()
    norm[:2] = torch.tensor([0.0, -0.0])
    equal = write_safetensors(tmp_path / "equal", weights | {"lm_head.weight": head})
    (equal / "config.json").write_bytes((model / "config.json").read_bytes())
    reader = stored_in_small_blocks(equal, tmp_path / "checkpoint", monkeypatch)
    changed = norm.clone()
    changed[:2] = torch.tensor([-0.0, -0.0])
    head = head.clone()
    head[[0, 400], [0, 63]] += torch.tensor([0.25, 0.5])
    other = write_safetensors(tmp_path / "other", weights | {"model.norm.weight": changed, "lm_head.weight": head})

    def differences(directory: Path) -> list[WeightDifference]:
        return sum_up(different_weights(arch, reader, directory, stored=torch.float32, worker=Told().worker))

    assert differences(equal) == []
    assert differences(other) == [
        WeightDifference("lm_head.weight", 2, pytest.approx(0.5)),
        WeightDifference("model.norm.weight", 1, 0.0),
    ]


def test_what_keeps_tensors_from_being_the_model_is_named(model: Path) -> None:
    arch = read_architecture(model)
    found: dict[str, tuple[tuple[int, ...], list[Box]]] = {}
    for parameter in stored_parameters(arch):
        found.setdefault(parameter.key, (parameter.shape, []))[1].extend(parameter.boxes())
    assert stored_problems(arch, found) == []
    embedding, final = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight"
    # Another padding, of a training at another tensor-parallel size, is as good; less than the vocabulary is not.
    assert stored_problems(arch, found | {embedding: ((768, 64), [Box((0, 0), (768, 64))])}) == []
    cut = {embedding: ((400, 64), [Box((0, 0), (400, 64))])}
    assert stored_problems(arch, found | cut) == [
        f"{embedding} has shape [400, 64], the configuration asks for [512, 64]"
    ]
    assert stored_problems(arch, found | {final: ((64,), [])}) == [f"{final} has 0 of its 64 values"]
    assert stored_problems(arch, found | {"extra": ((1,), [])}) == ["extra has no place in the model"]
    assert stored_problems(replace(arch, qkv_bias=False), found) == [
        "decoder.layers.self_attention.linear_qkv.bias has no place in the model"
    ]
    del found[final]
    assert stored_problems(arch, found) == [f"{final} is missing"]


@given(sizes=st.lists(st.integers(1, 1000), min_size=1), count=st.integers(1, 9))
def test_shares_are_runs_of_about_the_same_size(sizes: list[int], count: int) -> None:
    runs = split_evenly(sizes, count, lambda size: size)
    assert len(runs) == count
    assert [size for run in runs for size in run] == sizes
    assert all(sum(run) <= sum(sizes) / count + max(sizes) for run in runs)


def test_an_error_of_one_thread_ends_the_others_and_is_raised() -> None:
    both, done = threading.Barrier(2), []

    def work(number: int, items: Iterator[int]) -> None:
        for item in items:
            if item == 0:
                both.wait(timeout=10)
            if number == 1:
                raise ConversionError("number 1")
            failed.wait(timeout=10)
            done.append(item)

    failed = threading.Event()
    threading.Timer(0.2, failed.set).start()
    with pytest.raises(ConversionError, match="number 1"):
        in_threads(work, [range(1000), range(1000)])
    assert done == [0]


def test_a_byte_budget_is_kept_and_what_is_larger_is_held_alone() -> None:
    budget, lock = ByteBudget(10), threading.Lock()
    held: list[int] = []
    most = []

    def work(_: int, sizes: Iterator[int]) -> None:
        for size in sizes:
            with budget.hold(size):
                with lock:
                    held.append(size)
                    most.append(list(held))
                threading.Event().wait(1e-3)
                with lock:
                    held.remove(size)

    in_threads(work, [[3, 4, 25, 1] * 5 for _ in range(4)])
    assert len(most) == 80
    assert all(sum(sizes) <= 10 or sizes == [25] for sizes in most)
    assert any(len(sizes) > 1 for sizes in most)


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("spoiled", [0, 7])
def test_an_error_in_any_writing_thread_is_raised(tmp_path: Path, spoiled: int) -> None:
    """Of eight boxes the first thread writes number 0, the last one number 7."""

    def make(number: int) -> torch.Tensor:
        if number == spoiled:
            raise ConversionError(f"no values of {number}")
        return torch.ones(1, 4)

    boxes = [
        LazyBox(
            key="a",
            shape=(8, 4),
            dtype=torch.float32,
            box=Box((number, 0), (1, 4)),
            make=lambda number=number: make(number),
        )
        for number in range(8)
    ]
    with pytest.raises(CheckpointException) as caught:
        save_lazily(tmp_path, boxes, threads=3, advance=lambda _: None)
    assert str(caught.value.failures[0][0]) == f"no values of {spoiled}"
    assert not (tmp_path / ".metadata").exists()


@pytest.mark.usefixtures("world_of_one")
def test_a_full_disk_in_any_writing_thread_is_raised(tmp_path: Path) -> None:
    boxes = [
        LazyBox(
            key="a",
            shape=(4, 2**15),
            dtype=torch.float32,
            box=Box((number, 0), (1, 2**15)),
            make=lambda: torch.ones(1, 2**15),
        )
        for number in range(4)
    ]
    with largest_file(2**16), pytest.raises(CheckpointException) as caught:
        save_lazily(tmp_path, boxes, threads=2, advance=lambda _: None)
    said = r"__0_[01]\.distcp: can't be written \(File too large\): make room, or choose another directory$"
    assert re.search(said, str(caught.value.failures[0][0]))
