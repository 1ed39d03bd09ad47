"""A loss takes the keys that it reads, refuses the others by name, and every key reaches it."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest

from megadpo.config.choices import FDivergence, LossName
from megadpo.config.compose import compose_config
from megadpo.config.loss_rules import check_loss
from megadpo.config.schema import LossConfig
from megadpo.errors import ConfigError
from megadpo.loss.table import LOSSES, NOT_OFFERED

# A value of each key beside its default; beta changes with every loss that has one.
CHANGED: dict[str, Any] = {
    "beta": 0.3,
    "label_smoothing": 0.1,
    "ipo_length_normalize": False,
    "discopop_tau": 0.2,
    "simpo_gamma": 1.0,
    "f_divergence": FDivergence.js,
    "ld_alpha": 0.5,
}


def config(*names: str, **keys: Any) -> LossConfig:
    return replace(LossConfig(), name=[LossName(name) for name in names], **keys)


def usable(name: str) -> dict[str, Any]:
    """Keys without which the loss is refused."""
    return {"label_smoothing": 0.1} if name in ("exo_pair", "robust") else {}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_takes_its_keys_and_refuses_all_others(name: str) -> None:
    assert set(CHANGED) == {knob for spec in LOSSES.values() for knob in spec.knobs}
    assert check_loss(config(name, **usable(name))) == []
    for knob, value in CHANGED.items():
        violations = check_loss(config(name, **usable(name) | {knob: value}))
        if knob in LOSSES[name].knobs:
            assert violations == [], knob
        else:
            (line,) = violations
            of_one_reward = knob == "f_divergence" and LOSSES[name].needs_reference
            reason = "must be reverse_kl" if of_one_reward else "has no effect"
            assert line.startswith(f"loss.{knob}=") and f": {reason} with loss.name={name}" in line


def test_in_a_mix_one_reader_is_enough() -> None:
    mix = config("sigmoid", "sft", "ipo", "discopop", "simpo", **CHANGED | {"weights": [1.0, 0.5, 2.0, 1.0, 1.0]})
    assert check_loss(mix) == []
    (line,) = check_loss(config("hinge", "sft", label_smoothing=0.1))
    assert line == (
        "loss.label_smoothing=0.1: has no effect with loss.name=[hinge, sft]: leave it at 0.0, or use "
        "one of loss.name=sigmoid, robust, exo_pair, simpo"
    )


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (config(), "loss.name=[]: must name a loss: choose of sigmoid, robust, ipo"),
        (config("sft", "sft"), "loss.name=[sft, sft]: must name each loss once: give one of them a larger weight"),
        (config("sigmoid", weights=[1.0, 2.0]), "loss.weights=[1.0, 2.0]: must be one number for each of loss.name=[s"),
        (config("sigmoid", "sft", weights=[1.0]), "loss.weights=[1.0]: must be one number for each of loss.name="),
        (config("sigmoid", "sft", weights=[1.0, 0.0]), "loss.weights=[1.0, 0.0]: each must be a finite number > 0: "),
        (config("sft", weights=[float("inf")]), "loss.weights=[inf]: each must be a finite number > 0"),
        (config("exo_pair"), "loss.label_smoothing=0.0: must be above 0 with loss.name=exo_pair, whose formula"),
        (config("robust"), "loss.label_smoothing=0.0: must be above 0 with loss.name=robust, which is loss.name=sig"),
        (config("sft", beta=0.3), "loss.beta=0.3: has no effect with loss.name=sft but on the scale of logged rewards"),
        (
            config("sigmoid", "bco_pair", f_divergence=FDivergence.js),
            "loss.f_divergence=js: must be reverse_kl with loss.name=bco_pair, which looks at each response's reward",
        ),
        (
            config("sigmoid", f_alpha_divergence_coef=0.7),
            "loss.f_alpha_divergence_coef=0.7: has no effect with loss.f_divergence=reverse_kl: leave it at 0.5, or us",
        ),
    ],
)
def test_what_is_refused(loss: LossConfig, message: str) -> None:
    (line,) = check_loss(loss)
    assert line.startswith(message)


@pytest.mark.parametrize("word", [*(f"loss.name={name}" for name in NOT_OFFERED), "loss.use_weighting=true"])
def test_losses_of_other_trainers_are_refused_with_the_reason(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config(["+model=demo", "data.train_path=x", word])
    (line,) = caught.value.violations
    name = word.partition("loss.name=")[2] or "wpo"
    assert line.startswith(f"{word}: ") and line.endswith(f" is not offered: {NOT_OFFERED[name]}")


def test_every_key_reaches_the_loss() -> None:
    from megadpo.setup.trainer import build_loss

    keys = CHANGED | {"f_divergence": FDivergence.alpha, "f_alpha_divergence_coef": 0.7}
    run = compose_config(["+model=demo", "data.train_path=x"])
    loss = build_loss(replace(run, loss=config("ipo", "sft", weights=[2.0, 0.5], **keys)))
    assert loss.terms == ((2.0, "ipo"), (0.5, "sft"))
    assert asdict(loss.knobs) == keys
    assert build_loss(replace(run, loss=config("ipo", "sft"))).terms == ((1.0, "ipo"), (1.0, "sft"))
