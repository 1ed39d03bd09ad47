"""The store of kept log-probs: records come back to the last bit, damage is named, writers share it."""

from __future__ import annotations

import json
import multiprocessing as mp
from pathlib import Path

import numpy as np
import pytest

from megadpo.errors import CacheError
from megadpo.reference.key import PARTS, CacheKey
from megadpo.reference.store import open_store, other_keys
from tests.helpers.jobs.reference import append_slowly
from tests.helpers.no_room import largest_file

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
