"""The model card says what was trained, for how long, with which settings, and how the last metrics were."""

from __future__ import annotations

import yaml

from megadpo import __version__
from megadpo.models.conversion.export import model_card

SETTINGS = "loss:\n  beta: 0.1\ntrain:\n  global_batch_size: 4\n"


def card(metrics: dict[str, float]) -> str:
    health = "1 hint in 12 updates on 48 pairs: kl_drift (since step 9)"
    return model_card(name="llama70b", loss="ipo", steps=12, settings_yaml=SETTINGS, metrics=metrics, health=health)


def rows(text: str) -> list[list[str]]:
    """The cells of the table, its header first."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[1] == "|---" * (lines[0].count("|") - 1) + "|"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


def test_front_matter_is_yaml_that_the_hub_reads() -> None:
    before, front, _ = card({}).split("---\n", 2)
    assert before == ""
    front_matter = yaml.safe_load(front)
    assert front_matter["library_name"] == "transformers"
    assert front_matter["pipeline_tag"] == "text-generation"
    assert "dpo" in front_matter["tags"]


def test_says_what_was_trained() -> None:
    text = card({})
    assert "# llama70b, aligned to preferences\n" in text
    assert f"Trained for 12 steps on preference pairs with the ipo loss, by megadpo {__version__}." in text


def test_says_how_healthy_the_run_was() -> None:
    assert "\nHealth of the run: 1 hint in 12 updates on 48 pairs: kl_drift (since step 9).\n" in card({})


def test_settings_can_be_read_back() -> None:
    text = card({})
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == yaml.safe_load(SETTINGS)
    assert text.endswith("\n```\n")


def test_training_and_validation_metrics_stand_side_by_side() -> None:
    metrics = {
        "loss": 0.512345678,
        "eval/loss": 0.6,
        "rewards/accuracies": 1.0,
        "eval/logps/chosen": -123.25,
        "grad_norm": 3.0,
        "time/step_s": 0.5,
    }
    assert rows(card(metrics)) == [
        ["metric", "training", "validation"],
        ["`loss`", "0.512346", "0.6"],
        ["`rewards/accuracies`", "1", ""],
        ["`logps/chosen`", "", "-123.25"],
    ]


def test_a_zero_is_a_value() -> None:
    assert rows(card({"rewards/margins": 0.0})) == [["metric", "training"], ["`rewards/margins`", "0"]]


def test_each_named_validation_set_has_a_column() -> None:
    metrics = {"loss": 0.5, "eval/held_out/loss": 0.6, "eval/again/loss": 0.7}
    assert rows(card(metrics)) == [
        ["metric", "training", "validation again", "validation held_out"],
        ["`loss`", "0.5", "0.7", "0.6"],
    ]


def test_without_metrics_there_is_no_table() -> None:
    assert "|" not in card({}).split("## Settings")[0]
