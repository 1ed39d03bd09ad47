"""What a scoring says of its lines: the means that training logs, over all pairs and by length."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rich.console import Console

from megadpo.commands.score_summary import Buckets, Scores, bucket_table, read_scores, summarise, with_reference
from megadpo.loss.preference import PairLogProbs, PreferenceLoss, SequenceLogProbs, pair_statistics

BETA = 0.2


@pytest.fixture(scope="module")
def logps() -> np.ndarray:
    """[4, n]: chosen and rejected of the model, then of the reference; one pair is a tie under each of them."""
    logps_4n = np.random.default_rng(3).normal(-2000, 30, (4, 9))
    logps_4n[1, 4], logps_4n[3, 4] = logps_4n[0, 4], logps_4n[2, 4]
    return logps_4n


def lines_of(logps_4n: np.ndarray) -> list[dict[str, float]]:
    """What the two passes write, joined."""
    return [
        with_reference(
            {"index": i, "chosen_logp": c, "rejected_logp": r, "chosen_tokens": i + 1, "rejected_tokens": 2},
            {"index": i, "reference_chosen_logp": rc, "reference_rejected_logp": rr},
            BETA,
        )
        for i, (c, r, rc, rr) in enumerate(logps_4n.T.tolist())
    ]


def test_means_are_those_that_training_logs(logps: np.ndarray) -> None:
    lines = lines_of(logps)
    assert list(lines[0])[:5] == ["index", "chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens"]
    means = read_scores(lines).means(BETA)
    tokens_n = torch.ones(9, dtype=torch.long)
    chosen, rejected, reference_chosen, reference_rejected = map(torch.from_numpy, logps)
    policy = SequenceLogProbs(chosen, rejected, chosen, rejected)
    reference = SequenceLogProbs(reference_chosen, reference_rejected, reference_chosen, reference_rejected)
    pairs = PairLogProbs(policy, reference, tokens_n, tokens_n, mean_chosen_tokens=1.0)
    loss = PreferenceLoss("sigmoid", beta=BETA)
    sums = pair_statistics(loss(pairs), loss.rewards(pairs), policy)
    for name, value in means.items():
        if name != "logps/margins":
            assert value == pytest.approx(float(sums[name]) / 9, rel=1e-12), name
    assert means["logps/margins"] == pytest.approx(means["logps/chosen"] - means["logps/rejected"])
    assert means["rewards/margins"] == pytest.approx(np.mean([line["reward_margin"] for line in lines]))
    assert lines[4]["reward_margin"] == pytest.approx(0, abs=1e-9)


def test_a_model_alone_has_no_rewards(logps: np.ndarray) -> None:
    lines = [{name: value for name, value in line.items() if "re" not in name} for line in lines_of(logps)]
    lines = [{**line, "rejected_logp": -1.0, "rejected_tokens": 2} for line in lines]
    means = read_scores(lines).means(BETA)
    assert list(means) == ["logps/chosen", "logps/rejected", "logps/margins", "logps/accuracies"]


def test_quantiles_fill_buckets_equally_and_never_part_equal_lengths() -> None:
    lengths_n = np.arange(1, 41)
    edges = Buckets().edges_of(lengths_n)
    assert np.histogram(lengths_n, [0, *edges, 99])[0].tolist() == [10, 10, 10, 10]
    assert Buckets().edges_of(np.full(7, 12)) == []
    assert Buckets().edges_of(np.array([5, 5, 5, 5, 5, 5, 9, 9])) == [9]
    assert Buckets(count=1).edges_of(lengths_n) == []
    assert Buckets(edges=(3, 700)).edges_of(lengths_n) == [3, 700]


def test_buckets_have_their_own_means(logps: np.ndarray) -> None:
    scores = read_scores(lines_of(logps))
    summary = {"pairs": 9, **summarise(scores, np.full(9, 50), Buckets(edges=(6, 100)), BETA)}
    rows = summary["buckets"]["rows"]
    assert [(row["from"], row["below"], row["pairs"]) for row in rows] == [(0, 6, 3), (6, 100, 6), (100, None, 0)]
    short = Scores((logps[0, :3], logps[1, :3]), (logps[2, :3], logps[3, :3]), np.arange(3))
    assert {name: rows[0][name] for name in short.means(BETA)} == pytest.approx(short.means(BETA))
    assert summary["rewards/margins"] == pytest.approx(
        (3 * rows[0]["rewards/margins"] + 6 * rows[1]["rewards/margins"]) / 9
    )
    assert list(rows[2]) == ["from", "below", "pairs"]

    by_stream = summarise(scores, np.arange(9), Buckets(by="stream", edges=(6,)), BETA)["buckets"]
    assert by_stream["by"] == "stream" and [row["pairs"] for row in by_stream["rows"]] == [6, 3]

    console = Console(record=True, width=80)
    console.print(bucket_table(summary))
    said = console.export_text()
    assert all(text in said for text in ("response tokens", "0 to 5", "6 to 99", "100 and more", "all"))
    assert f"{summary['rewards/margins']:.4f}" in said and "…" not in said
