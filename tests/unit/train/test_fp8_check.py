"""What the margin monitor says is the change of the rewards' margins that the loss has, whatever the loss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megadpo.loss.preference import PreferenceLoss, SequenceLogProbs
from megadpo.train import fp8_check

CPU = torch.device("cpu")
LENGTHS = torch.tensor([200, 10, 250, 40])  # of two chosen, then of two rejected responses


def logps(*pairs: tuple[float, float, float, float]) -> list[SequenceLogProbs]:
    return [SequenceLogProbs(*torch.tensor(pairs, dtype=torch.float64).T)]


IN_FP8 = logps((-400.0, -500.0, 0.0, -90.0), (-20.0, -70.0, 0.0, -50.0))
PLAIN = logps((-410.0, -502.0, 0.0, -88.0), (-20.0, -74.0, 0.0, -56.0))
REFERENCE_IN_FP8 = logps((-395.0, -490.0, 0.0, -85.0), (-19.0, -68.0, 0.0, -49.0))
REFERENCE = logps((-396.0, -490.0, 0.0, -85.0), (-19.0, -68.0, 0.0, -45.0))


def errors(loss: PreferenceLoss) -> dict[str, float]:
    # Lengths are read where the log-probs are.
    on_device = SimpleNamespace(num_pairs=2, response_tokens_S=LENGTHS)
    microbatch = SimpleNamespace(to=lambda device: on_device if device is CPU else None)
    batch: Any = SimpleNamespace(microbatches=[microbatch], mean_chosen_tokens=105.0)
    state: Any = SimpleNamespace(is_last_stage=True, tensor_rank=0)
    reference: Any = SimpleNamespace(chunks=(), log_probs=mock.Mock(side_effect=[REFERENCE_IN_FP8, REFERENCE]))
    with (
        mock.patch.object(fp8_check, "score", side_effect=[IN_FP8, PLAIN]),
        mock.patch.object(fp8_check, "gather_rows", lambda values: values[None]),
    ):
        return fp8_check.margin_errors([], reference, loss, batch, state=state, torch_device=CPU)


@pytest.mark.parametrize(
    ("loss", "together", "policy_alone"),
    [
        # Margins of log-ratios by hand: in FP8 100 - 95 and 50 - 49, without 92 - 94 and 54 - 49.
        (PreferenceLoss("sigmoid", beta=0.1), [0.7, 0.4], [0.8, 0.4]),
        # Tails count half: rejected sums rise by half of them. 55 - 52.5 and 25 - 24.5; 48 - 51.5 and 26 - 26.5.
        (PreferenceLoss("sigmoid", beta=0.1, ld_alpha=0.5), [0.6, 0.1], [0.7, 0.1]),
        # Per token, and no reference: -2 + 2, -2 + 1.75; -2.05 + 2.008, -2 + 1.85.
        (PreferenceLoss("simpo", beta=2.0), [0.084, 0.2], [0.084, 0.2]),
    ],
    ids=["sigmoid", "ld", "simpo"],
)
def test_errors_are_those_of_the_loss_s_rewards(
    loss: PreferenceLoss, together: list[float], policy_alone: list[float]
) -> None:
    found = errors(loss)
    assert found["margin_error"] == pytest.approx(sum(together) / 2)
    assert found["margin_error_max"] == pytest.approx(max(together))
    assert found["policy_margin_error"] == pytest.approx(sum(policy_alone) / 2)
