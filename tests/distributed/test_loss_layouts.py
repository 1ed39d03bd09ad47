"""Every loss and mix is one number, and one gradient, however its pairs are packed and over whatever ranks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers.jobs.loss import PAIRS, Cut, Found, Step, trials_of_every_loss
from tests.helpers.launch import launch
from tests.helpers.loss_cases import CASES
from tests.helpers.tiny_models import write_tiny_model

ALL, HALVES, SINGLY = Cut(10_000), Cut(290), Cut(1)
CUTS = [ALL, HALVES, SINGLY, Cut(10_000, share_prompt=False), Cut(200, share_prompt=False)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A policy, and a reference that differs from it a little."""
    root = tmp_path_factory.mktemp("losses")
    policy = write_tiny_model(root / "policy", "llama", num_layers=2, seed=0)
    reference = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=noise))
    reference.save_pretrained(root / "reference")
    return str(policy), str(root / "reference")


@pytest.fixture(scope="module")
def alone(models: tuple[str, str]) -> dict[str, Found]:
    """Steps on one rank with every cut, and evaluations."""
    (found,) = launch(1, trials_of_every_loss, *models, {}, CUTS, [PAIRS, 3])
    return found


def assert_same_step(expected: Step, actual: Step, where: str) -> None:
    assert actual.loss == pytest.approx(expected.loss, rel=1e-6, abs=1e-6), where
    assert actual.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5), where


@pytest.mark.parametrize("name", CASES)
def test_packing_changes_neither_loss_nor_gradient(name: str, alone: dict[str, Found]) -> None:
    whole, *others = alone[name].steps
    assert [step.microbatches for step in alone[name].steps[:3]] == [1, 2, PAIRS]
    for step, cut in zip(others, CUTS[1:], strict=True):
        assert_same_step(whole, step, str(cut))
        assert step.gradient_gap <= 1e-5, cut


def test_losses_differ(alone: dict[str, Found]) -> None:
    """Nothing above can pass because all losses are one."""
    norms = sorted(found.steps[0].grad_norm for found in alone.values())
    assert norms[0] > 1e-4 and all(b > a * (1 + 1e-6) for a, b in pairwise(norms))


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}], ids=["tp2", "pp2"])
def test_two_ranks_are_one(layout: dict[str, int], models: tuple[str, str], alone: dict[str, Found]) -> None:
    for rank in launch(2, trials_of_every_loss, *models, layout, [HALVES]):
        for name, found in rank.items():
            assert_same_step(alone[name].steps[0], found.steps[0], name)
            assert found.steps[0].microbatches == 2, name


def test_data_ranks_may_have_different_numbers_of_pairs(models: tuple[str, str], alone: dict[str, Found]) -> None:
    """Half each, three and five, all and none: a mean of the ranks' means is right in the first case only."""
    cuts = [HALVES, Cut(150), ALL]
    ranks = launch(2, trials_of_every_loss, *models, {}, cuts)
    for name in CASES:
        assert [[step.own_pairs for step in rank[name].steps] for rank in ranks] == [[4, 3, PAIRS], [4, 5, 0]]
        for rank in ranks:
            for step, cut in zip(rank[name].steps, cuts, strict=True):
                assert_same_step(alone[name].steps[0], step, f"{name}, {cut}")


@pytest.mark.parametrize("name", CASES)
def test_evaluation_is_a_mean_over_the_set_in_groups_of_any_size(name: str, alone: dict[str, Found]) -> None:
    assert alone[name].evaluations == pytest.approx([alone[name].steps[0].loss] * 2, rel=1e-6, abs=1e-6)
