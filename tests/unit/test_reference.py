"""The parts of a reference: the store of log-probs and its key, weights that wait on the host, no reference at all."""

from __future__ import annotations

import json
import math
import multiprocessing as mp
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megadpo.errors import CacheError
from megadpo.planner.meter import LiveBytes
from megadpo.reference import CachedReference, NoReference, OffloadedReference, ResidentReference, resident
from megadpo.reference.key import PARTS, CacheKey, cache_key
from megadpo.reference.store import open_store, other_keys
from megadpo.reference_cache import missing_groups
from tests.helpers.reference_jobs import append_slowly

CPU = torch.device("cpu")
RECORD_BYTES = 52


def key_of(**parts: str) -> CacheKey:
    return CacheKey(dict.fromkeys(PARTS, "same") | parts)


def digests_of(count: int) -> list[bytes]:
    """Some with zeros at the end, which must count."""
    return [bytes([i % 250 + 1, i // 250]) + bytes(14) for i in range(count)]


def values_of(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(-4000.0, 100.0, (count, 4))


@pytest.fixture
def filled(tmp_path: Path) -> tuple[Path, list[bytes], np.ndarray]:
    digests, values = digests_of(40), values_of(40)
    with open_store(tmp_path, key_of()) as store:
        store.append(digests[:30], values[:30])
        store.append(digests[20:], values[20:] + 1.0)  # what is known stays as it is
    return tmp_path, digests, np.concatenate([values[:30], values[30:] + 1.0])


# The store


def test_records_come_back_to_the_last_bit(filled: tuple[Path, list[bytes], np.ndarray]) -> None:
    directory, digests, values = filled
    store = open_store(directory, key_of())
    assert len(store) == 40 and store.known([*digests, bytes(16)]).tolist() == [True] * 40 + [False]
    assert store.lookup(digests[::-1]).tobytes() == values[::-1].tobytes()
    (segment,) = store.segments()
    assert segment.stat().st_size == 40 * RECORD_BYTES


def test_every_flipped_byte_is_found_and_the_file_named(filled: tuple[Path, list[bytes], np.ndarray]) -> None:
    directory = filled[0]
    (segment,) = open_store(directory, key_of()).segments()
    whole = segment.read_bytes()
    for place in (*range(5 * RECORD_BYTES, 6 * RECORD_BYTES), len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        segment.write_bytes(bytes(damaged))
        with pytest.raises(CacheError) as caught:
            open_store(directory, key_of())
        first = place // RECORD_BYTES * RECORD_BYTES
        assert str(caught.value).startswith(f"{segment}: the record at byte {first} is damaged (1 of 40 are)")
        assert str(caught.value).endswith("Remove the file: its pairs are computed again")
    segment.unlink()
    assert len(open_store(directory, key_of())) == 0


def test_an_interrupted_record_is_left_out_and_written_again(filled: tuple[Path, list[bytes], np.ndarray]) -> None:
    directory, digests, values = filled
    (segment,) = open_store(directory, key_of()).segments()
    whole = segment.read_bytes()
    for cut in (1, RECORD_BYTES - 1):
        segment.write_bytes(whole[:-cut])
        with open_store(directory, key_of()) as store:
            assert store.known(digests).tolist() == [True] * 39 + [False]
            store.append(digests, values)
        again = open_store(directory, key_of())
        assert again.lookup(digests).tobytes() == values.tobytes() and len(again.segments()) == 2
        again.segments()[1].unlink()


def test_records_of_another_key_are_not_taken_for_ones_own(filled: tuple[Path, list[bytes], np.ndarray]) -> None:
    directory = filled[0]
    (segment,) = open_store(directory, key_of()).segments()
    other = open_store(directory, key_of(weights="other"))
    assert len(other) == 0
    (other.directory / segment.name).write_bytes(segment.read_bytes())
    with pytest.raises(CacheError, match=r"is damaged \(40 of 40 are\)"):
        other.refresh()
    (other.directory / "key.json").write_text(json.dumps(dict(key_of(weights="third").parts)))
    with pytest.raises(CacheError, match=r"its key.json is not what was written"):
        open_store(directory, key_of(weights="other"))


def test_what_differs_from_another_key_is_named(filled: tuple[Path, list[bytes], np.ndarray]) -> None:
    directory = filled[0]
    with open_store(directory, key_of(weights="x", template="y", precision="fp32")) as far:
        far.append([bytes(16)], np.zeros((1, 4)))
    open_store(directory, key_of(config="never filled"))
    near, distant = other_keys(directory, key_of(weights="new", precision="bf16"))
    assert near.differences == ["the reference's weights", "the precision (same then, bf16 now)"]
    assert distant.differences == [
        "the reference's weights",
        "the chat template",
        "the precision (fp32 then, bf16 now)",
    ]
    assert other_keys(directory, key_of())[0].directory != open_store(directory, key_of()).directory


def test_a_directory_that_takes_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"file.*: can't be written \(.*\): make room, or choose another directory"):
        open_store(tmp_path / "file" / "cache", key_of())


def test_readers_beside_a_writer_see_whole_records(tmp_path: Path) -> None:
    digests, values = digests_of(300), values_of(300)
    writer = mp.get_context("forkserver").Process(target=append_slowly, args=(tmp_path, key_of(), digests, values))
    writer.start()
    readers, seen = [open_store(tmp_path, key_of()) for _ in range(2)], set()
    while writer.is_alive():
        for reader in readers:
            reader.refresh()
            seen.add(len(reader))
            assert reader.lookup(digests[: len(reader)]).tobytes() == values[: len(reader)].tobytes()
    writer.join()
    assert writer.exitcode == 0 and len(seen) > 2
    assert len(open_store(tmp_path, key_of())) == 300


# The key


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    for name in ("model-1.safetensors", "model-2.safetensors", "tokenizer.json", "chat_template.jinja"):
        (directory / name).write_text(name)
    (directory / "config.json").write_text('{"hidden_size": 64, "torch_dtype": "bfloat16"}')
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<e>", "chat_template": "one"}')
    return directory


def key_at(model: Path, precision: str = "fp32") -> CacheKey:
    return cache_key(
        weight_files=model.glob("*.safetensors"),
        config_file=model / "config.json",
        tokenizer_dir=model,
        precision=precision,
        index_dir=model.parent / "cache",
    )


@pytest.mark.parametrize(
    ("file", "content", "part"),
    [
        ("model-2.safetensors", "model-3.safetensors", "weights"),
        ("config.json", '{"hidden_size": 65}', "config"),
        ("tokenizer.json", "other", "tokenizer"),
        ("tokenizer_config.json", '{"eos_token": "<f>", "chat_template": "one"}', "tokenizer"),
        ("tokenizer_config.json", '{"eos_token": "<e>", "chat_template": "two"}', "template"),
        ("chat_template.jinja", "other", "template"),
        ("config.json", '{"hidden_size": 64, "dtype": "float32", "transformers_version": "9"}', None),
    ],
)
def test_a_changed_file_changes_its_part_of_the_key(file: str, content: str, part: str | None, model: Path) -> None:
    before = key_at(model)
    (model / file).write_text(content)
    after = key_at(model)
    assert [name for name in PARTS if before.parts[name] != after.parts[name]] == ([part] if part else [])
    assert (before.digest == after.digest) == (part is None)
    assert key_at(model, "bf16").digest != after.digest


def test_a_weight_file_is_read_once_and_again_when_it_changes(model: Path) -> None:
    before = key_at(model)
    index = model.parent / "cache" / "files.jsonl"
    with index.open("a") as file:
        file.write('["torn')
    with mock.patch("megadpo.reference.key._hash_of_file", side_effect=AssertionError):
        assert key_at(model) == before
    (model / "model-1.safetensors").write_text("changed")
    assert key_at(model) != before
    with mock.patch("megadpo.reference.key._hash_of_file", side_effect=AssertionError):
        assert key_at(model) != before
    (model / "config.json").unlink()
    with pytest.raises(CacheError, match=r"reference.mode=cached: .*config.json: can't be read"):
        key_at(model)


# What is missing


def test_whole_groups_stay_as_training_makes_them_and_the_rest_comes_behind() -> None:
    order, known = np.array([5, 3, 0, 7, 6, 1, 2, 4]), np.zeros(8, np.bool_)
    assert [list(group) for group in missing_groups(order, known, 3)] == [[5, 3, 0], [7, 6, 1], [2, 4]]
    known[[3, 1, 6]] = True
    assert [list(group) for group in missing_groups(order, known, 3)] == [[2, 4], [5, 0, 7]]
    assert missing_groups(order, np.ones(8, np.bool_), 3) == []


# Weights on the host


@pytest.fixture
def scored() -> Iterator[list[Any]]:
    """What stands in for a pass: the weights' values and the living bytes while it runs."""
    seen: list[Any] = []

    def score(chunks: list[torch.nn.Module], batch: LiveBytes, *, device: torch.device) -> list[Any]:
        seen.append((batch.now, [p.detach().float().numpy().copy() for chunk in chunks for p in chunk.parameters()]))
        return []

    with mock.patch.object(resident, "score", score):
        yield seen


def test_offloaded_weights_are_on_the_device_during_the_pass_only(scored: list[Any]) -> None:
    chunks = [torch.nn.Linear(300, 200), torch.nn.Linear(200, 100, bias=False)]
    expected = [p.detach().numpy().copy() for chunk in chunks for p in chunk.parameters()]
    size = 4 * (300 * 200 + 200 + 200 * 100)
    assert ResidentReference(chunks, device=CPU).device_bytes() == size
    reference = OffloadedReference(chunks, device=CPU)
    with LiveBytes() as meter:
        for _ in range(2):
            assert (meter.now, reference.device_bytes()) == (0, 0)
            reference.log_probs(meter)  # type: ignore[arg-type]
        reference.prepare()
        assert meter.now == reference.device_bytes() == size
        reference.log_probs(meter)  # type: ignore[arg-type]
        assert (meter.now, meter.peak, reference.device_bytes()) == (0, size, 0)
    assert [now for now, _ in scored] == [size] * 3
    for _, values in scored:
        assert all(np.array_equal(a, b) for a, b in zip(values, expected, strict=True))


@pytest.mark.parametrize("kind", [ResidentReference, OffloadedReference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixing_moves_every_weight_towards_the_policy(
    kind: type[ResidentReference], dtype: torch.dtype, scored: list[Any]
) -> None:
    own, policy = (torch.nn.Linear(50, 40).to(dtype) for _ in range(2))
    before, target = own.weight.detach().clone(), policy.weight.detach()
    reference = kind([own], device=CPU)
    reference.mix_in([policy], 0.25)
    with LiveBytes() as meter:
        reference.log_probs(meter)  # type: ignore[arg-type]
    half_ulp = 2**-9 if dtype is torch.bfloat16 else 2**-24
    exact = 0.75 * before.double() + 0.25 * target.double()
    assert (torch.from_numpy(scored[0][1][0]).double() - exact).abs().max() <= half_ulp * float(exact.abs().max()) * 2
    reference.mix_in([policy], 1.0)
    with reference.weights():
        assert torch.equal(own.weight, target)


# Numbers without a model


def test_kept_and_missing_numbers_answer_on_the_last_stage_only() -> None:
    batch: Any = SimpleNamespace(
        microbatches=[
            SimpleNamespace(pair_digests=(b"b", b"a"), num_pairs=2),
            SimpleNamespace(pair_digests=(), num_pairs=0),
        ]
    )
    values = {b"a": (-math.pi, -1.0, -0.5, 0.0), b"b": (-2.0, -math.e, 0.0, -0.25)}
    first, empty = CachedReference(values, is_last_stage=True, device=CPU).log_probs(batch)
    assert first.chosen_B.tolist() == [-2.0, -math.pi] and first.rejected_B.tolist() == [-math.e, -1.0]
    assert first.chosen_tail_B.tolist() == [0.0, -0.5] and first.rejected_tail_B.tolist() == [-0.25, 0.0]
    assert first.chosen_B.dtype is torch.float64 and empty.chosen_B.shape == (0,)
    nothing = NoReference(is_last_stage=True, device=CPU).log_probs(batch)
    assert [scores.chosen_B.tolist() for scores in nothing] == [[0.0, 0.0], []]
    for reference in (
        CachedReference(values, is_last_stage=False, device=CPU),
        NoReference(is_last_stage=False, device=CPU),
    ):
        assert reference.log_probs(batch) == [] and reference.device_bytes() == 0
