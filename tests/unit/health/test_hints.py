"""What hints at an unhealthy run is found, and said once; runs that learn get no hint; a resumed run knows its past."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megadpo.config.compose import compose_config
from megadpo.health.hints import Change, Health
from megadpo.health.history import RunFacts
from megadpo.health.log import HealthLog
from megadpo.health.rules import RULES
from megadpo.metrics.trackers import open_trackers
from megadpo.setup.trainer import build_loss, health_facts
from tests.helpers.health_histories import FACTS, Course, good_course, training_lines
from tests.helpers.no_room import largest_file

ROOT = Path(__file__).parents[3]
GOOD_RUNS = 40

# One course for each rule that looks at more than one update.
BAD = {
    "chosen_reward_falling": Course(chosen=lambda t: -8 * t),
    "margin_saturating": Course(margin=lambda t: 8 * min(1.0, 3 * t), quality=3.0, spread=0.1),
    "accuracy_flat": Course(quality=0.0),
    "kl_drift": Course(margin=lambda t: 8 * t, chosen=lambda t: 40 * t, tokens=120.0),
    "length_bias": Course(per_token=0.006),
    "gradient_always_clipped": Course(norm=8.0),
}

Lines = Iterable[tuple[int, Mapping[str, float]]]


def heard(lines: Lines, facts: RunFacts = FACTS, *, begun_after: int = 0) -> tuple[Health, list[Change]]:
    health = Health(facts, begun_after=begun_after)
    return health, [change for step, metrics in lines for change in health.observe(step, metrics)]


def names(health: Health) -> list[str]:
    return [hint.name for hint in health.hints]


# Runs that learn


@pytest.mark.parametrize("tenth", range(10))
def test_a_run_that_learns_gets_no_hint(tenth: int) -> None:
    for seed in range(tenth, GOOD_RUNS, 10):
        course, sizes = good_course(seed)
        health, changes = heard(training_lines(course, **sizes))
        assert [change for change in changes if not change.hint.note] == [], (seed, sizes)
        assert health.verdict.startswith("healthy: no hints in ")


# Runs that don't


@pytest.mark.parametrize(("batch", "log_every"), [(4, 1), (64, 1), (256, 2)])
@pytest.mark.parametrize("name", BAD)
def test_each_bad_course_gets_its_hint_and_no_other(name: str, batch: int, log_every: int) -> None:
    lines = training_lines(BAD[name], batch=batch, updates=max(12_800 // batch, 200), log_every=log_every)
    health, _ = heard(lines)
    assert set(names(health)) == {name}
    rule = next(rule for rule in RULES if rule.name == name)
    assert health.hints[0].advice == rule.advice
    assert all(math.isfinite(value) for value in health.hints[0].evidence.values())


def test_evidence_has_the_numbers() -> None:
    (hint,) = heard(training_lines(BAD["gradient_always_clipped"], updates=100))[0].hints
    assert hint.first_step == 100
    assert hint.message.startswith("100% of the last 100 updates were clipped at 1; their median gradient norm is ")
    assert hint.evidence["median"] == pytest.approx(6.0, rel=0.2)  # it falls as pairs are told apart


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("margin_saturating", replace(FACTS, loss_at_start=None, least_loss=None)),
        ("kl_drift", replace(FACTS, has_reference=False)),
        ("gradient_always_clipped", replace(FACTS, clip_grad=0.0)),
        ("kl_drift", replace(FACTS, beta=1.0)),  # rewards as large stand for a tenth of the nats
        ("margin_saturating", replace(FACTS, least_loss=-5.0)),
    ],
)
def test_facts_of_the_run_count(name: str, facts: RunFacts) -> None:
    lines = list(training_lines(BAD[name]))
    assert name in names(heard(lines)[0])
    assert name not in names(heard(lines, facts)[0])


def test_without_a_reference_rewards_fall_per_token() -> None:
    """0.2 · β nats per token are a fall there; beside log-ratios of whole responses, 0.02 is nothing."""
    lines = list(training_lines(Course(chosen=lambda t: -0.04 * t, margin=lambda t: 0.01)))
    assert names(heard(lines)[0]) == []
    assert names(heard(lines, replace(FACTS, has_reference=False))[0]) == ["chosen_reward_falling"]


def test_a_fall_beside_a_larger_gain_is_no_hint() -> None:
    course = Course(chosen=lambda t: -t, margin=lambda t: 8 * t, quality=1.0)
    assert "chosen_reward_falling" not in names(heard(training_lines(course))[0])
    assert "chosen_reward_falling" in names(heard(training_lines(replace(course, chosen=lambda t: -14 * t)))[0])


def test_a_warm_up_is_not_held_against_accuracy() -> None:
    """The first 6400 of 12800 pairs bring the sum of learning rates to 3200 pairs' at the peak."""
    course = Course(quality=0.0, warmup=1.0)
    (hint,) = heard(training_lines(course, updates=200))[0].hints
    assert hint.first_step > 100
    (at_once,) = heard(training_lines(replace(course, warmup=1e-9), updates=200))[0].hints
    assert at_once.first_step in (64, 65)  # 64 · 64 = 4096, a sum of floats


def test_without_a_reference_accuracy_is_measured_against_its_beginning() -> None:
    """No policy starts at chance there: a good one stands at 0.7 from the first line on."""
    alone = replace(FACTS, has_reference=False)
    falling = Course(margin=lambda t: 0.02 * (1 - t), quality=0.6, chosen=lambda t: 0.0)
    rising = Course(margin=lambda t: 0.02 * (1 + t), chosen=lambda t: 0.0)
    assert names(heard(training_lines(falling), alone)[0]) == ["accuracy_flat"]
    assert names(heard(training_lines(falling), FACTS)[0]) == []
    assert names(heard(training_lines(rising), alone)[0]) == []
    later = [(step + 50, metrics) for step, metrics in training_lines(falling)]
    assert names(heard(later, alone, begun_after=50)[0]) == []  # its beginning is not known


def test_a_loss_without_preference_has_spikes_only() -> None:
    alone = replace(FACTS, has_preference=False, has_reference=False)
    for name in ("chosen_reward_falling", "accuracy_flat", "length_bias"):
        assert names(heard(training_lines(BAD[name]), alone)[0]) == []
    lines = [(step, m | ({"loss": 50.0} if step == 70 else {})) for step, m in training_lines(Course(), updates=90)]
    assert names(heard(lines, alone)[0]) == ["loss_spike"]


def test_what_a_loss_is_made_for_is_no_hint() -> None:
    falling, far = list(training_lines(BAD["chosen_reward_falling"])), list(training_lines(BAD["kl_drift"]))
    assert names(heard(falling, replace(FACTS, raises_chosen=False))[0]) == []
    assert names(heard(far, replace(FACTS, aimed_drift=0.5))[0]) == ["kl_drift"]
    assert names(heard(far, replace(FACTS, aimed_drift=2.5))[0]) == []


# Spikes


@pytest.mark.parametrize(("key", "name"), [("loss", "loss_spike"), ("grad_norm", "grad_norm_spike")])
def test_a_spike_is_told_with_its_step_and_rows(key: str, name: str) -> None:
    health = Health(FACTS, begun_after=0)
    changes = []
    for step, metrics in training_lines(Course(), updates=120):
        larger = {key: 50 * metrics[key]} if step in (70, 75) else {}
        changes += health.observe(step, metrics | larger, rows=[step, 7])
    (change,) = changes
    assert (change.hint.name, change.hint.first_step, change.hint.last_step, change.hint.times) == (name, 70, 75, 2)
    assert change.hint.rows == (70, 7)
    assert "times the median of the 64 lines before" in change.hint.message


def test_a_line_of_skipped_updates_is_not_judged_and_not_counted() -> None:
    lines = list(training_lines(Course(), updates=20))
    skipped = {"steps/skipped": 3, "lr": 1e-6, "pairs": 0.0}
    shifted = [(step if step <= 10 else step + 3, metrics) for step, metrics in lines]
    with_skipped = [*shifted[:10], *((step, skipped) for step in (11, 12, 13)), *shifted[10:]]
    health, verdict = heard(with_skipped)[0], heard(lines)[0].verdict
    assert health.verdict == f"{verdict} (3 steps were skipped)"


def test_few_lines_and_losses_below_zero_have_no_spikes() -> None:
    lines = list(training_lines(Course(), updates=60))
    early = [(step, metrics | ({"loss": 50.0} if step == 20 else {})) for step, metrics in lines]
    below = [(step, metrics | {"loss": 50.0 if step == 50 else -metrics["loss"]}) for step, metrics in lines]
    for changed in (early, below):
        assert "loss_spike" not in names(heard(changed)[0])


def test_an_epoch_s_short_last_batch_is_neither_a_spike_nor_a_measure() -> None:
    noisy = {"loss": 50.0, "grad_norm": 50.0}
    for pairs, found in ((31.0, []), (33.0, ["loss_spike", "grad_norm_spike"])):
        lines = [
            (step, metrics | ({"pairs": pairs, **noisy} if step == 70 else {}))
            for step, metrics in training_lines(Course(), updates=90)
        ]
        assert names(heard(lines)[0]) == found
    every_other = [
        (step, metrics | ({"pairs": 20.0, **noisy} if step % 3 == 0 else {"loss": 50.0} if step == 100 else {}))
        for step, metrics in training_lines(Course(), updates=110)
    ]
    (hint,) = heard(every_other)[0].hints
    assert (hint.name, hint.first_step) == ("loss_spike", 100)


def test_a_later_spike_is_another_hint_and_the_verdict_counts() -> None:
    lines = [
        (step, metrics | ({"grad_norm": 50.0} if step in (70, 300) else {}))
        for step, metrics in training_lines(Course(), updates=320)
    ]
    health, changes = heard(lines)
    assert [change.begins for change in changes] == [True, False, True]
    assert health.verdict.startswith("1 hint in 320 ")
    assert health.verdict.endswith(": grad_norm_spike (2 times, steps 70 to 300)")


# Beginning, ending, judging


def test_a_hint_is_told_once_and_ends_when_it_has_not_held_for_long() -> None:
    clipped = list(training_lines(BAD["gradient_always_clipped"], updates=150))
    calm = [(150 + step, metrics) for step, metrics in training_lines(Course(), updates=150)]
    health, changes = heard([*clipped, *calm])
    assert [change.begins for change in changes] == [True, False]
    (hint,) = health.hints
    assert hint.first_step == 100
    assert 150 <= hint.last_step < 160  # 95 of 100 updates: a few calm ones go through
    assert hint.ended_at == hint.last_step + 32
    assert health.verdict == (
        "healthy: no hints in 300 updates on 19200 pairs; "
        f"to note: gradient_always_clipped (steps 100 to {hint.last_step})"
    )


def test_a_hint_that_holds_again_goes_on_and_is_not_said_again() -> None:
    """Each time it has to be quiet for twice as long before it ends."""
    one = {True: BAD["gradient_always_clipped"], False: Course()}
    lines = [
        (150 * part + step, metrics)
        for part in range(6)
        for step, metrics in training_lines(one[part % 2 == 0], updates=150)
    ]
    health, changes = heard(lines)
    own = [change for change in changes if change.hint.name == "gradient_always_clipped"]
    assert [change.begins for change in own] == [True, False, False, False]
    (hint,) = [hint for hint in health.hints if hint.name == "gradient_always_clipped"]
    assert (hint.first_step, hint.endings) == (100, 3)
    assert hint.last_step > 750
    assert hint.ended_at == hint.last_step + 4 * 32


def test_a_short_run_is_not_judged() -> None:
    health, _ = heard(training_lines(Course(), updates=7))
    assert health.verdict.startswith("not judged: 7 updates on 448 pairs are too few")
    assert heard(training_lines(Course(), updates=8))[0].verdict == "healthy: no hints in 8 updates on 512 pairs"


def test_other_lines_and_lines_with_holes_are_passed_over() -> None:
    lines = list(training_lines(Course(), updates=20))
    step, last = lines.pop()
    others = [(20, {"eval/loss": 0.5}), (20, {"fp8/margin_error": 0.5}), (20, last | {"grad_norm": math.nan})]
    health, _ = heard([*lines, *others])
    assert health.history.updates == 19
    assert not health.observe(step, dict.fromkeys(last))  # null in metrics.jsonl
    health.observe(21, last)
    assert (health.history.updates, health.history.pairs) == (21, 21 * 64)  # the line with holes counts with the next


# In a run


def write(path: Path, lines: Lines) -> None:
    path.write_text("".join(json.dumps({"step": step, **metrics}) + "\n" for step, metrics in lines), encoding="utf-8")


def report(run_dir: Path) -> dict[str, object]:
    return json.loads((run_dir / "health.json").read_text(encoding="utf-8"))


@pytest.fixture
def spiky() -> list[tuple[int, dict[str, float]]]:
    lines = training_lines(BAD["chosen_reward_falling"], updates=200)
    return [(step, metrics | ({"grad_norm": 30.0} if step == 60 else {})) for step, metrics in lines]


def run(run_dir: Path, lines: Lines, *, resume_step: int = 0, anew: bool = False) -> HealthLog:
    log = HealthLog(run_dir, FACTS, resume_step=resume_step, anew=anew, locate_row=lambda row: f"pairs.jsonl:{row + 1}")
    for step, metrics in lines:
        log.observe(step, metrics, [step])
    return log


def test_hints_are_warnings_and_stand_in_the_file(
    tmp_path: Path, spiky: list[tuple[int, dict[str, float]]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="megadpo"):
        verdict = run(tmp_path, spiky).finish()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [text.split(": ")[1].split(" at ")[0] for text in warnings] == ["chosen_reward_falling", "grad_norm_spike"]
    assert "Its pairs: pairs.jsonl:61. Look at the pairs" in warnings[1]
    assert caplog.messages[-1] == f"health: {verdict}; see {tmp_path / 'health.json'} and docs/health.md"
    assert verdict.startswith("2 hints in 200 updates on 12800 pairs: chosen_reward_falling (since step ")
    assert report(tmp_path)["verdict"] == verdict


def test_a_resumed_run_is_judged_as_if_never_interrupted(
    tmp_path: Path, spiky: list[tuple[int, dict[str, float]]], caplog: pytest.LogCaptureFixture
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for directory in (whole, parts):
        directory.mkdir()
    run(whole, spiky).finish()
    run(parts, spiky[:170])
    write(parts / "metrics.jsonl", spiky[:170])  # without the tracker it is not cut, and the last part goes again
    caplog.clear()
    run(parts, spiky[150:], resume_step=150).finish()
    assert report(parts) == report(whole)
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


def test_a_branch_in_another_directory_begins_where_it_begins(
    tmp_path: Path, spiky: list[tuple[int, dict[str, float]]]
) -> None:
    run(tmp_path, spiky[100:150], resume_step=100)
    write(tmp_path / "metrics.jsonl", spiky[100:150])
    log = run(tmp_path, spiky[150:], resume_step=150)
    assert (log.health.history.updates, log.health.history.pairs) == (100, 6400)


def test_a_run_that_goes_on_with_another_loss_is_judged_anew(tmp_path: Path) -> None:
    """Its own past is no measure of it, neither then nor when it is resumed once more."""
    before = list(training_lines(Course(), updates=200))
    after = [(200 + s, m | {"loss": 30 * m["loss"], "grad_norm": 40 * m["grad_norm"]}) for s, m in before]
    assert names(run(tmp_path, before).health) == []
    write(tmp_path / "metrics.jsonl", before)
    assert "loss_spike" in names(run(tmp_path, after, resume_step=200).health)
    spiky = [(s, m | ({"grad_norm": 30.0} if s == 60 else {})) for s, m in before]
    run(tmp_path, spiky)
    assert "loss_spike" not in names(run(tmp_path, after[:100], resume_step=200, anew=True).health)
    write(tmp_path / "metrics.jsonl", before + after[:100])
    again = run(tmp_path, after[100:], resume_step=300)
    assert names(again.health)[0] == "grad_norm_spike", "what was told before is kept"
    assert "loss_spike" not in names(again.health)
    assert "in 200 updates on 12800 pairs since step 200" in again.finish()


@pytest.mark.parametrize("reported", [True, False])
@pytest.mark.parametrize("trackers_first", [True, False])
def test_no_updates_are_counted_that_were_not_heard(
    trackers_first: bool, reported: bool, tmp_path: Path, spiky: list[tuple[int, dict[str, float]]]
) -> None:
    """A branch goes on in a directory of its own, where the tracker may have opened an empty file before."""
    if reported:
        run(tmp_path, [])
    if trackers_first:
        with open_trackers(["jsonl"], tmp_path, resume_step=150, settings={}):
            log = run(tmp_path, spiky[150:], resume_step=150)
    else:
        log = run(tmp_path, spiky[150:], resume_step=150)
    assert (log.health.history.updates, log.health.history.pairs) == (50, 50 * 64)
    assert log.health.begun_after == 150
    assert "in 50 updates on 3200 pairs since step 150" in log.finish()


def test_lines_without_a_report_count_from_where_they_begin(
    tmp_path: Path, spiky: list[tuple[int, dict[str, float]]]
) -> None:
    write(tmp_path / "metrics.jsonl", spiky[100:150])
    assert run(tmp_path, [], resume_step=150).health.history.updates == 50


def test_hints_outlive_the_lines_they_were_found_in(
    tmp_path: Path, spiky: list[tuple[int, dict[str, float]]], caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, spiky[:190])
    before = [hint["name"] for hint in report(tmp_path)["hints"]]
    assert before == ["chosen_reward_falling", "grad_norm_spike"]
    caplog.clear()
    log = run(tmp_path, spiky[190:], resume_step=190)
    assert names(log.health) == before
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "2 hints in 10 updates on 640 pairs since step 190: chosen_reward_falling (" in log.finish()


def test_what_fails_is_said_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ArithmeticError("of a rule")

    log = run(tmp_path, [])
    monkeypatch.setattr(Health, "observe", fail)
    monkeypatch.setattr(Health, "verdict", property(fail))
    for step, metrics in training_lines(Course(), updates=5):
        log.observe(step, metrics, [])
    assert log.finish() == "not judged"
    texts = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert texts == [
        "health: step 1 can't be judged (ArithmeticError('of a rule'); the run goes on)",
        "health: there is no verdict at the end (ArithmeticError('of a rule'))",
    ]


def test_a_loss_without_bound_is_a_spike_like_any_other() -> None:
    lines = [(s, m | {"loss": 1e300 if s == 70 else 1e-300}) for s, m in training_lines(Course(), updates=80)]
    assert "loss_spike" in names(heard(lines)[0])


@pytest.mark.parametrize("name", ["metrics.jsonl", "health.json"])
def test_files_that_can_t_be_read_cost_the_past_only(
    name: str, tmp_path: Path, spiky: list[tuple[int, dict[str, float]]], caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "metrics.jsonl", spiky[:150])
    (tmp_path / name).write_bytes(b'{"hints": [1]}\xff\n')
    log = run(tmp_path, spiky[150:], resume_step=150)
    assert "what came before step 150 can't be read" in caplog.text
    assert log.health.history.updates == 50


def test_a_torn_last_line_is_passed_over(tmp_path: Path, spiky: list[tuple[int, dict[str, float]]]) -> None:
    write(tmp_path / "metrics.jsonl", spiky[:150])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 151, "lo')
    assert run(tmp_path, [], resume_step=150).health.history.updates == 150


def test_a_full_disk_is_said_once_and_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with largest_file(10):
        run(tmp_path, training_lines(BAD["accuracy_flat"], updates=100)).finish()
    texts = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [text for text in texts if "can't be written" in text] == texts[:1]
    assert "accuracy_flat" in texts[1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {"has_reference": True, "loss_at_start": pytest.approx(math.log(2)), "least_loss": pytest.approx(0.0)}),
        (["loss.beta=0.2", "optimizer.clip_grad=3"], {"beta": 0.2, "clip_grad": 3}),
        (["optimizer.lr=2e-6"], {"peak_lr": 2e-6}),
        (["loss.name=ipo"], {"aimed_drift": 2.5, "raises_chosen": True, "has_preference": True}),
        (["loss.name=apo_down"], {"raises_chosen": False}),
        (["loss.name=[sigmoid,sft]"], {"has_preference": True, "loss_at_start": None, "least_loss": None}),
        (["loss.name=sft", "reference.mode=none"], {"has_preference": False, "has_reference": False}),
    ],
)
def test_facts_come_from_the_configuration(words: list[str], expected: dict[str, object]) -> None:
    config = compose_config(["+model=hf", "data.train_path=pairs.jsonl", *words])
    facts = asdict(health_facts(config, build_loss(config)))
    assert {name: facts[name] for name in expected} == expected


# The page


def test_the_page_names_every_hint() -> None:
    page = (ROOT / "docs" / "health.md").read_text(encoding="utf-8")
    table = page.split("## The hints")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in rows] == [rule.name for rule in RULES]
