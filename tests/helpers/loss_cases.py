"""Losses as tests name them, and what a loss is given: pairs of random log-probs, token by token."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from megadpo.data.batch import PreferenceBatch, build_batch
from megadpo.data.tokenization import TokenizedPair
from megadpo.loss.preference import PreferenceLoss
from megadpo.loss.table import LOSSES


class LossCase(NamedTuple):
    """A loss, or a mix, and its knobs."""

    names: tuple[str, ...]
    knobs: dict[str, Any]

    def loss(self) -> PreferenceLoss:
        """The loss that it describes."""
        return PreferenceLoss(*self.names, **self.knobs)


def _every_loss() -> dict[str, LossCase]:
    """Each loss under its name, with knobs away from their defaults where a value of 0 would hide a mistake."""
    knobs = {
        "beta": {"ipo": 0.3, "sppo_hard": 0.3, "simpo": 2.0},
        "label_smoothing": {"robust": 0.2, "exo_pair": 0.1},
        "simpo_gamma": {"simpo": 0.8},
    }
    return {
        name: LossCase(
            (name,), {"beta": 0.1} | {knob: values[name] for knob, values in knobs.items() if name in values}
        )
        for name in LOSSES
    }


CASES = _every_loss() | {
    "cdpo": LossCase(("sigmoid",), {"beta": 0.1, "label_smoothing": 0.2}),
    "ipo of the paper": LossCase(("ipo",), {"beta": 0.3, "ipo_length_normalize": False}),
    "smoothed simpo": LossCase(("simpo",), {"beta": 2.0, "label_smoothing": 0.2}),
    "other discopop": LossCase(("discopop",), {"beta": 0.1, "discopop_tau": 0.3}),
    "forward kl": LossCase(("sigmoid",), {"beta": 0.1, "f_divergence": "forward_kl"}),
    "js": LossCase(("ipo",), {"beta": 0.1, "f_divergence": "js"}),
    "alpha": LossCase(("hinge",), {"beta": 0.1, "f_divergence": "alpha", "f_alpha_divergence_coef": 0.7}),
    "ld": LossCase(("sigmoid",), {"beta": 0.1, "ld_alpha": 0.3}),
    "ld per token": LossCase(("sigmoid_norm",), {"beta": 0.1, "ld_alpha": 0.0}),
    "rpo": LossCase(("sigmoid", "sft"), {"beta": 0.1, "weights": (1.0, 0.5), "ld_alpha": 0.5}),
    "mpo": LossCase(("sigmoid", "bco_pair", "sft"), {"beta": 0.1, "weights": (0.8, 0.2, 1.0)}),
    "simpo with sft": LossCase(("simpo", "sft"), {"beta": 2.0}),
}


def random_pairs(count: int, vocab_size: int, *, seed: int, longest: int = 30) -> list[TokenizedPair]:
    """Pairs of random tokens whose responses have different lengths, either one being the longer."""
    draw = np.random.default_rng(seed)

    def tokens(low: int) -> np.ndarray:
        return draw.integers(3, vocab_size, size=draw.integers(low, longest))

    return [TokenizedPair(index, tokens(2), tokens(1), tokens(1)) for index in range(count)]


def packed(pairs: list[TokenizedPair]) -> PreferenceBatch:
    """All of the pairs in one microbatch."""
    length = sum(len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs)
    return build_batch(pairs, num_tokens=length, pad_token_id=0, share_prompt=True)


def random_logps(rows: int, *, seed: int, like: torch.Tensor | None = None) -> torch.Tensor:
    """Log-probs of tokens, fp64; those of a second model differ a little from the first's, `like`."""
    draw = torch.Generator().manual_seed(seed)
    if like is None:
        return -3.0 * torch.rand(rows, generator=draw, dtype=torch.float64) - 0.05
    return (like + 0.3 * torch.randn(rows, generator=draw, dtype=torch.float64)).clamp(max=-1e-3)
