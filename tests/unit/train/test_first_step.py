"""What the first step must show where the reference is the starting policy, and what is said where it does not."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from megadpo.config.compose import compose_config
from megadpo.errors import TrainingError
from megadpo.setup.trainer import build_loss, trainer_settings
from megadpo.train.first_step import ExpectedFirstLoss, check_first_loss


def expected(*words: str) -> ExpectedFirstLoss | None:
    config = compose_config(["+model=hf", "model.hf_path=x", "data.train_path=x", "device.kind=cpu", *words])
    return trainer_settings(config, build_loss(config), 10).expected_first_loss


@pytest.mark.parametrize(
    ("words", "value", "tolerance"),
    [
        ([], math.log(2), 1e-6),
        (["reference.mode=offload", "precision.dtype=fp32"], math.log(2), 1e-6),
        (["reference.mode=cached", "precision.dtype=fp32"], math.log(2), 1e-5),
        (["reference.mode=cached", "precision.dtype=bf16"], math.log(2), 1e-3),
        (["reference.mode=cached", "precision.dtype=fp32", "precision.fp8=mxfp8"], math.log(2), 1e-3),
        (["loss.name=[sigmoid,sft]"], None, 1e-6),
    ],
)
def test_the_bound_goes_by_mode_and_precision(words: list[str], value: float | None, tolerance: float) -> None:
    found = expected(*words)
    assert found is not None
    assert (found.value, found.tolerance) == (value, tolerance)


def test_without_the_same_weights_nothing_is_asked(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    start = f"model.hf_path={tmp_path / 'one'}"
    assert expected("loss.name=[simpo,sft]", "reference.mode=none") is None
    assert expected(start, f"reference.hf_path={tmp_path / 'other'}") is None
    assert expected(start, f"reference.hf_path={tmp_path / 'other' / '..' / 'one'}") is not None


def means(loss: float, chosen: float, rejected: float) -> dict[str, float]:
    return {"loss": loss, "rewards/chosen": chosen, "rewards/rejected": rejected}


@pytest.mark.parametrize(
    ("value", "right", "wrong", "said"),
    [
        (
            math.log(2),
            means(math.log(2) + 0.9e-6, 0.0, 0.0),
            means(math.log(2) + 1.1e-6, 2e-6, -2e-6),
            r"step 1: the loss is 0\.69314828\d; .* so it must be 0\.693147181 \(tolerance 1e-06, live; rewards "
            r"2\.000e-06 and -2\.000e-06 must be 0\)\. Look\. Nothing was saved\.",
        ),
        (25.0, means(25.0 + 2.4e-5, 0.0, 0.0), means(25.0 + 2.6e-5, 0.0, 0.0), r"must be 25\.000000000"),
        (math.log(2), means(0.6931472, 0.0, 0.0), means(math.nan, 0.0, 0.0), r"the loss is nan"),
        # A part of the loss has no reference: any loss will do, rewards will not.
        (
            None,
            means(3.5, 0.9e-6, -0.9e-6),
            means(3.5, 0.0, -1.1e-6),
            r"step 1: rewards are 0\.000e\+00 and -1\.100e-06; .* so they must be 0 \(tolerance 1e-06, live\)\. Look\.",
        ),
        (None, means(3.5, 0.0, 0.0), means(3.5, math.nan, 0.0), r"rewards are nan"),
    ],
)
def test_a_first_step_that_is_off_is_told(
    value: float | None, right: dict[str, float], wrong: dict[str, float], said: str
) -> None:
    expected = ExpectedFirstLoss(value, 1e-6, "live", "Look")
    check_first_loss(1, right, expected)
    with pytest.raises(TrainingError) as caught:
        check_first_loss(1, wrong, expected)
    assert re.search(said, str(caught.value)), str(caught.value)
