"""FLOPs against torch's own count of a model's forward pass, and by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from megadpo.metrics.flops import FlopRates, achieved_flops, pair_flops, step_flops
from megadpo.models.hf_config import read_architecture
from tests.helpers.tiny_models import write_tiny_model


@pytest.mark.parametrize(("family", "further"), [("llama", {}), ("qwen3", {"head_dim": 32}), ("qwen2", {"heads": 8})])
def test_rates_are_torchs_count_of_transformers_model(family: str, further: dict[str, int], tmp_path: Path) -> None:
    """torch counts the full square of attention and the head on every token."""
    directory = write_tiny_model(tmp_path, family, num_layers=2, **further)
    rates = read_architecture(directory).flop_rates
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    tokens = 12
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(tokens)[None])
    expected = tokens * (rates.per_token + rates.per_response_token) + tokens**2 * rates.per_key
    assert counter.get_total_flops() == expected


def test_pairs_count_what_is_seen() -> None:
    rates = FlopRates(per_token=1000, per_key=10, per_response_token=100)
    # prompt of 2, responses of 1 and 3: keys seen 1+2+3 and, by the second response, 2+1, 2+2, 2+3
    assert pair_flops(rates, 2, 1, 3, share_prompt=True) == 6 * 1000 + (6 + 12) * 10 + 4 * 100
    assert pair_flops(rates, 2, 1, 3, share_prompt=False) == 8 * 1000 + (6 + 15) * 10 + 4 * 100


def test_a_step_is_three_forwards_of_the_policy_and_one_of_the_reference() -> None:
    assert step_flops(1000, 10) == 3010


def test_utilisation_is_a_ranks_share_of_its_cards_peak() -> None:
    achieved = achieved_flops(8e14, ranks=4, peak=1e15)
    assert achieved == {"throughput/tflops_per_rank": 200.0, "throughput/mfu": 0.2}
    assert achieved_flops(8e14, ranks=4, peak=None) == {"throughput/tflops_per_rank": 200.0}
