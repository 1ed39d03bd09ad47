"""The parts of a reference: the store of log-probs and its key, weights that wait on the host, no reference at all."""

from __future__ import annotations

import json
import math
import multiprocessing as mp
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megadpo.config.choices import Dtype, Fp8Recipe
from megadpo.config.schema import PrecisionConfig
from megadpo.errors import CacheError
from megadpo.planner.meter import LiveBytes
from megadpo.reference import CachedReference, NoReference, OffloadedReference, ResidentReference, resident
from megadpo.reference.agreement import compare, noise_bounds
from megadpo.reference.key import PARTS, CacheKey, cache_key
from megadpo.reference.store import open_store, other_keys
from megadpo.setup.reference_cache import missing_groups
from tests.helpers.no_room import largest_file
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


def test_two_writers_keep_what_came_first(tmp_path: Path) -> None:
    digests, values = digests_of(3), values_of(3)
    with open_store(tmp_path, key_of()) as one, open_store(tmp_path, key_of()) as two:
        one.append(digests[:1], values[:1])
        two.append(digests[:2], values[:2] + 1.0)
        one.append(digests, values + 2.0)
        expected = [values[0], values[1] + 1.0, values[2] + 2.0]
        two.refresh()
        assert np.array_equal(one.lookup(digests), expected) and np.array_equal(two.lookup(digests), expected)
        assert one.append(digests, values) is None and len(one.segments()) == 2
    assert np.array_equal(open_store(tmp_path, key_of()).lookup(digests), expected)


def test_a_full_disk_loses_nothing_that_was_kept(tmp_path: Path) -> None:
    digests, values = digests_of(40), values_of(40)
    with open_store(tmp_path, key_of()) as store:
        store.append(digests[:10], values[:10])
        with (
            largest_file(15 * RECORD_BYTES + 7),
            pytest.raises(CacheError, match=r"can't be written .*: make room, or"),
        ):
            store.append(digests[10:], values[10:])
        assert len(store) == 10
        store.append(digests[10:], values[10:])  # into a segment of its own: the first one ends in a part of a record
    again = open_store(tmp_path, key_of())
    assert again.lookup(digests).tobytes() == values.tobytes()
    assert [path.stat().st_size for path in again.segments()] == [15 * RECORD_BYTES + 7, 25 * RECORD_BYTES]


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
    index = model.parent / "cache" / "hashes.txt"
    whole = index.read_text()
    index.write_text(f"{whole}\n1234abcd torn")
    with mock.patch("megadpo.reference.key._hash_of_file", side_effect=AssertionError):
        assert key_at(model) == before
    (model / "model-1.safetensors").write_text("changed")
    assert key_at(model) != before
    with mock.patch("megadpo.reference.key._hash_of_file", side_effect=AssertionError):
        assert key_at(model) != before
    (model / "config.json").unlink()
    with pytest.raises(CacheError, match=r"config.json: can't be read \(No such file or directory\); kept log-probs"):
        key_at(model)


def test_a_damaged_hash_is_not_believed(model: Path) -> None:
    before, index = key_at(model), model.parent / "cache" / "hashes.txt"
    lines = [line for line in index.read_text().splitlines() if line]
    for place in range(len(lines[0])):
        damaged = bytearray(lines[0].encode())
        damaged[place] ^= 1
        index.write_bytes(bytes(damaged) + b"\n" + lines[1].encode() + b"\n")
        with mock.patch("megadpo.reference.key._hash_of_file", return_value="read again") as read:
            key_at(model)
        read.assert_called_once_with(model / "model-1.safetensors")
    index.unlink()
    assert key_at(model) == before


def test_files_that_look_alike_are_told_apart(model: Path) -> None:
    """Whoever copies them may give every file the same size and date."""
    path = model / "model-1.safetensors"
    path.write_bytes(bytes(3 * 2**20))
    before, about = key_at(model), path.stat()
    stat = Path.stat
    for place, always in ((0, about), (2**20, about), (3 * 2**20 - 1, about), (1_300_000, None)):
        content = bytearray(3 * 2**20)
        content[place] = 1
        path.write_bytes(bytes(content))
        os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (about.st_size, about.st_mtime_ns)
        # All dates the same: pieces of the content tell. No piece has changed: the time of change does.
        with mock.patch.object(Path, "stat", lambda self, a=always: a if a and self == path else stat(self)):
            after = key_at(model)
        assert [name for name in PARTS if before.parts[name] != after.parts[name]] == ["weights"]
        assert cache_key_without_index(model) == after
    path.write_bytes(bytes(3 * 2**20))
    assert key_at(model) == before


def cache_key_without_index(model: Path) -> CacheKey:
    with mock.patch("megadpo.reference.key._FileHashes", side_effect=AssertionError):
        return cache_key(
            weight_files=model.glob("*.safetensors"),
            config_file=model / "config.json",
            tokenizer_dir=model,
            precision="fp32",
            index_dir=None,
        )


# Other numbers than before


def usual(precision: PrecisionConfig, tokens: int, per_token: float, *, biased: bool = False) -> bool:
    """Whether log-probs of so long responses are as far apart as is usual, each token being off by so much."""
    draw = np.random.default_rng(0)
    pairs: Any = [SimpleNamespace(chosen=range(tokens), rejected=range(tokens), index=i) for i in range(8)]
    one = draw.normal(-4.0 * tokens, 10.0, (8, 4))
    off = per_token * tokens if biased else draw.normal(0.0, per_token, (8, 4, tokens)).sum(axis=2)
    return (
        compare(pairs, one, one + off).noise <= noise_bounds(str(precision.dtype), fp8=precision.fp8 is not None).usual
    )


@pytest.mark.parametrize("tokens", [20, 400])
def test_rounding_is_told_from_other_weights(tokens: int) -> None:
    """Errors of tokens add up like a random walk; a short training moves a response's tokens by hundredths of nats."""
    fp32, bf16 = PrecisionConfig(dtype=Dtype.fp32), PrecisionConfig()
    fp8 = PrecisionConfig(fp8=Fp8Recipe.blockwise)
    assert usual(fp32, tokens, 2e-5) and usual(bf16, tokens, 0.03) and usual(fp8, tokens, 0.06)
    assert not usual(fp32, tokens, 1e-3) and not usual(bf16, tokens, 0.1) and not usual(fp8, tokens, 0.2)
    assert not usual(bf16, tokens, 0.02, biased=True) and not usual(fp32, tokens, 1e-4, biased=True)


def test_the_worst_row_is_told() -> None:
    pairs: Any = [SimpleNamespace(chosen=range(4), rejected=range(16), index=10 * i) for i in range(3)]
    kept = np.full((3, 4), -100.0)
    off = np.array([[0, 0, 9, 9], [0.2, -0.2, 9, 9], [0.0, 0.3, 9, 9]], np.float64)
    found = compare(pairs, kept, kept + off)
    assert (found.row, found.kept, found.computed) == (10, [-100.0, -100.0], [-99.8, -100.2])
    assert found.noise == pytest.approx(math.sqrt((0.1**2 + 0.05**2 + 0.075**2) / 6))


# What is missing


def test_whole_groups_stay_as_training_makes_them_and_the_rest_comes_behind() -> None:
    order, known, first = np.array([5, 3, 0, 7, 6, 1, 2, 4]), np.zeros(8, np.bool_), np.ones(8, np.bool_)

    def groups() -> list[list[int]]:
        return [list(group) for group in missing_groups(order, known, first, 3)]

    assert groups() == [[5, 3, 0], [7, 6, 1], [2, 4]]
    known[[3, 1, 6]] = True
    assert groups() == [[2, 4], [5, 0, 7]]
    # 6 is the pair 3 again, 2 and 4 are 0 and 1: after a kill the second group is what it would have been.
    known[:], first[[6, 2, 4]] = False, False
    assert groups() == [[5, 3, 0], [7, 6, 1]]
    known[[5, 3, 0, 6, 2]] = True
    assert groups() == [[7, 6, 1]]
    known[:] = True
    assert groups() == []


# Weights on the host


@pytest.fixture
def scored() -> Iterator[list[Any]]:
    """What stands in for a pass: the weights' values and the living bytes while it runs."""
    seen: list[Any] = []

    def score(chunks: list[torch.nn.Module], batch: LiveBytes, *, torch_device: torch.device) -> list[Any]:
        seen.append((batch.now, [p.detach().float().numpy().copy() for chunk in chunks for p in chunk.parameters()]))
        return []

    with mock.patch.object(resident, "score", score):
        yield seen


def test_offloaded_weights_are_on_the_device_during_the_pass_only(scored: list[Any]) -> None:
    chunks = [torch.nn.Linear(300, 200), torch.nn.Linear(200, 100, bias=False)]
    expected = [p.detach().numpy().copy() for chunk in chunks for p in chunk.parameters()]
    size = 4 * (300 * 200 + 200 + 200 * 100)
    assert ResidentReference(chunks, torch_device=CPU).device_bytes() == size
    reference = OffloadedReference(chunks, torch_device=CPU)
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
    reference = kind([own], torch_device=CPU)
    reference.follow([policy], 0.25)
    with LiveBytes() as meter:
        reference.log_probs(meter)  # type: ignore[arg-type]
    half_ulp = 2**-9 if dtype is torch.bfloat16 else 2**-24
    exact = 0.75 * before.double() + 0.25 * target.double()
    assert (torch.from_numpy(scored[0][1][0]).double() - exact).abs().max() <= half_ulp * float(exact.abs().max()) * 2
    reference.follow([policy], 1.0)
    with reference.weights():
        assert torch.equal(own.weight, target)


@pytest.mark.parametrize("kind", [ResidentReference, OffloadedReference])
def test_a_checkpoint_holds_the_weights_of_a_reference_that_follows(kind: type[ResidentReference]) -> None:
    own = torch.nn.Linear(5, 4)
    before = own.weight.detach().clone()
    with kind([own], torch_device=CPU, follows=True).saved() as chunks:
        assert torch.equal(chunks[0].weight, before)
    with kind([own], torch_device=CPU).saved() as chunks:
        assert list(chunks) == [], "one that never changes is read again from where it came"


# Numbers without a model


def test_kept_and_missing_numbers_answer_on_the_last_stage_only() -> None:
    batch: Any = SimpleNamespace(
        microbatches=[
            SimpleNamespace(num_pairs=2),
            SimpleNamespace(pair_digests=(), num_pairs=0),
        ]
    )
    digests = [b"b\0".ljust(16), b"a\0".ljust(16), b"c" * 16]
    kept = digests, np.array([(-2.0, -math.e, 0.0, -0.25), (-math.pi, -1.0, -0.5, 0.0), (-3.0,) * 4])
    batch.microbatches[0].pair_digests = tuple(digests[:2])
    cached = CachedReference(*kept, is_last_stage=True, torch_device=CPU)
    first, empty = cached.log_probs(batch)
    assert torch.equal(first.columns(), torch.tensor(kept[1][:2])) and cached.kept(digests).tolist() == kept[1].tolist()
    for unknown in (b"0" * 16, b"bb" * 8, b"d" * 16):
        with pytest.raises(KeyError):
            cached.kept([digests[0], unknown])
    assert first.chosen_B.tolist() == [-2.0, -math.pi] and first.rejected_B.tolist() == [-math.e, -1.0]
    assert first.chosen_tail_B.tolist() == [0.0, -0.5] and first.rejected_tail_B.tolist() == [-0.25, 0.0]
    assert first.chosen_B.dtype is torch.float64 and empty.chosen_B.shape == (0,)
    nothing = NoReference(is_last_stage=True, torch_device=CPU).log_probs(batch)
    assert [scores.chosen_B.tolist() for scores in nothing] == [[0.0, 0.0], []]
    for reference in (
        CachedReference(*kept, is_last_stage=False, torch_device=CPU),
        NoReference(is_last_stage=False, torch_device=CPU),
    ):
        assert reference.log_probs(batch) == [] and reference.device_bytes() == 0
