"""tools/inspect_data.py: the numbers it shows, counted by hand, and what its page and its terminal make of the data."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from megadpo.data.store import PairCounts
from megadpo.errors import ConfigError
from tests.helpers.runs import write_jsonl
from tests.helpers.tiny_models import write_tiny_model
from tests.helpers.tokenizers import byte_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools"))  # as `python tools/inspect_data.py` has it

import inspect_data
from inspection import decoding, statistics, terminal


def lengths(full: list[tuple[int, int, int]], kept: list[tuple[int, int, int]] | None = None) -> statistics.PairLengths:
    """Of pairs given as (prompt, chosen, rejected)."""
    full_n, kept_n = np.array(full).T, np.array(kept or full).T
    return statistics.PairLengths(
        prompt_n=kept_n[0],
        chosen_n=kept_n[1],
        rejected_n=kept_n[2],
        full_prompt_n=full_n[0],
        full_chosen_n=full_n[1],
        full_rejected_n=full_n[2],
    )


# Numbers


def test_sharing_counts_each_prompt_once_instead_of_twice() -> None:
    saved = statistics.sharing(lengths([(10, 3, 2), (20, 1, 4)]))
    assert (saved.separate, saved.shared) == (2 * 30 + 10, 30 + 10)
    assert saved.saved == pytest.approx(30 / 70)


def test_sharing_counts_what_is_kept() -> None:
    assert statistics.sharing(lengths([(10, 30, 20)], kept=[(10, 5, 5)])).shared == 20


def test_a_sequence_is_the_prompt_with_the_longer_response() -> None:
    series = lengths([(10, 3, 2), (20, 1, 4)]).full_series()
    assert series["whole sequence"].tolist() == [13, 24]
    assert series["rejected"].tolist() == [2, 4]


def test_spread() -> None:
    assert statistics.spread(np.arange(1, 21)) == statistics.Spread(mean=10.5, median=10.5, p95=19, longest=20)


def test_histogram_gathers_what_is_far_beyond_the_limit_in_its_last_bin() -> None:
    drawn = statistics.histogram({"a": np.array([1, 2, 7, 8, 90]), "b": np.array([3])}, max_length=4, bins=4)
    assert drawn.edges.tolist() == [0, 2, 4, 6, 8]
    assert drawn.counts["a"].tolist() == [1, 1, 0, 3]
    assert drawn.counts["b"].tolist() == [0, 1, 0, 0]


def test_histogram_ends_with_the_longest() -> None:
    assert statistics.histogram({"a": np.array([2, 10])}, max_length=100, bins=2).edges.tolist() == [0, 5, 10]


def test_most_cut_is_worst_first_and_leaves_out_whole_pairs() -> None:
    full = [(10, 5, 5), (10, 9, 5), (30, 5, 8), (10, 5, 9)]
    kept = [(10, 5, 5), (10, 5, 5), (24, 5, 6), (10, 5, 5)]
    losses = statistics.most_cut(lengths(full, kept), most=10)
    assert [(loss.position, loss.prompt, loss.chosen, loss.rejected) for loss in losses] == [
        (2, 6, 0, 2),
        (1, 0, 4, 0),
        (3, 0, 0, 4),
    ]
    assert losses[0].tokens == 8
    assert [loss.position for loss in statistics.most_cut(lengths(full, kept), most=1)] == [2]


@pytest.mark.parametrize(
    ("total", "wanted", "positions"),
    [(10, 3, [0, 4, 9]), (2, 5, [0, 1]), (9, 1, [0]), (9, 0, []), (4, 4, [0, 1, 2, 3])],
)
def test_spaced(total: int, wanted: int, positions: list[int]) -> None:
    assert statistics.spaced(total, wanted) == positions


def test_counted_rows_leave_out_what_did_not_happen() -> None:
    happened = {"read": 9, "kept": 4, "skipped": 2, "dropped_long_prompt": 3, "truncated_chosen": 1, "duplicate": 1}
    counts = PairCounts(**{name: happened.get(name, 0) for name in PairCounts.__dataclass_fields__})
    assert statistics.counted_rows(counts, max_length=64) == [
        ("read", 9),
        ("kept", 4),
        ("rows skipped, they can't be used", 2),
        ("pairs dropped, the prompt alone reaches 64 tokens", 3),
        ("chosen responses cut", 1),
        ("pairs that repeat an earlier one, kept", 1),
    ]
    assert statistics.dropped(counts) == 3


def test_sparkline_and_marker() -> None:
    drawn = statistics.Histogram(np.array([0.0, 2.0, 4.0, 6.0, 8.0]), {"a": np.array([800, 1, 0, 400])})
    assert terminal.sparkline(drawn, "a") == "█▁ ▄"
    assert terminal.marker(drawn, 5) == "  ▲"
    assert terminal.marker(drawn, 8) == "   ▲"
    assert terminal.marker(drawn, 9) is None


# Text


def test_special_tokens_are_pieces_of_their_own_and_control_characters_are_seen() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("<|user|>héé\n\x1b[31m<|end|><|end|>x")["input_ids"]
    pieces = list(decoding.decode_pieces(ids, 1, tokenizer, decoding.special_ids(tokenizer)))
    assert [(piece.text, piece.special) for piece in pieces] == [
        ("<|user|>", True),
        ("héé\n␛[31m", False),
        ("<|end|>", True),
        ("<|end|>", True),
        ("x", False),
    ]


# The tool


ROWS = [
    {"prompt": "Who? <script>alert('prompt')</script>", "chosen": " Me & <b>you</b>.", "rejected": " Nobody at all."},
    {"prompt": "See <img src=https://example.org/a.png>", "chosen": " Yes.", "rejected": " No." * 60},
    {"prompt": "x" * 400, "chosen": " a", "rejected": " b"},
    {"prompt": "Same?", "chosen": " so", "rejected": " so"},
    {"prompt": "Broken", "chosen": 5, "rejected": " b"},
]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Words for a model directory without weights and a file of all kinds of rows."""
    root = tmp_path_factory.mktemp("inspect")
    model = write_tiny_model(root / "model", "llama", num_layers=1)
    (model / "model.safetensors").unlink()
    data = write_jsonl(root / "pairs.jsonl", ROWS)
    return ["+model=hf", f"model.hf_path={model}", f"data.train_path={data}", "data.max_length=120"]


class Reader(HTMLParser):
    """Checks that elements close in order, and keeps text, tags and attributes."""

    VOID = ("meta", "br", "img", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_and_terminal(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")  # no name of a temporary directory breaks a line
    status = inspect_data.main([*command, "data.on_error=skip", "pairs=3", "output=page.html"])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]

    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    for row in (ROWS[0], ROWS[1], ROWS[3]):
        for part in ("prompt", "chosen", "rejected"):
            assert str(row[part])[:60] in reader.text
    assert {"svg", "mark", "article"} <= reader.tags
    assert reader.tags.isdisjoint({"script", "img", "link"})
    links = [value for name, value in reader.attributes if name in ("src", "href", "xlink:href", "style", "clip-path")]
    assert [value for value in links if re.search(r"https?:|//", value)] == []
    assert re.findall(r"https?://[^&<]*", re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL)) == []
    assert not re.search(r"@import|url\((?!#)", page)

    for text in (shown.out, reader.text):
        for expected in (
            "pairs.jsonl:2",
            "pairs with equal responses",
            "the prompt alone reaches 120 tokens",
            "chosen",
        ):
            assert expected in text
        assert re.search(r"pairs\.jsonl:5: .*chosen \(a number\)", text)
    assert re.search(r"\b5\s+read", shown.out)
    assert re.search(r"\b3\s+kept", shown.out)


def test_mistakes_in_its_own_words_come_with_those_of_the_configuration(command: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        inspect_data.read_words([*command, "pairs=-1", "output=no/such/page.html", "loss.beta=-1"])
    assert [text.partition(":")[0] for text in error.value.violations] == [
        "pairs=-1",
        "output=no/such/page.html",
        "loss.beta=-1.0",
    ]


def test_any_layout_is_fine(command: list[str]) -> None:
    config, pairs, output = inspect_data.read_words([*command, "parallel.tensor=8", "parallel.pipeline=4"])
    assert (config.parallel.tensor, pairs, output) == (8, 4, None)
