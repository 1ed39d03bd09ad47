"""Rotary position embeddings of a packed stream, in which positions restart at every sequence.

Legend: T rows of the stream, A heads, D head dimension, R = D/2 frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """Cosine and signed sine of every row's angles, [T, 1, 1, D]; computed once per microbatch, used by every layer.

    Frequency r rotates the pair of elements (r, r + R), Hugging Face's order.
    """

    cos_T11D: torch.Tensor
    sin_T11D: torch.Tensor

    @classmethod
    def of(
        cls, positions_T: torch.Tensor, inv_freq_R: torch.Tensor, *, scaling: float, dtype: torch.dtype
    ) -> RotaryTable:
        """Computes the table of rows at `positions_T` in fp32; `scaling` multiplies cosine and sine (YaRN's factor)."""
        angles_TR = torch.outer(positions_T.float(), inv_freq_R)
        angles_T11D = torch.cat((angles_TR, angles_TR), dim=-1)[:, None, None, :]
        return cls((angles_T11D.cos() * scaling).to(dtype), (angles_T11D.sin() * scaling).to(dtype))


def rotate(states_T1AD: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    """Returns the states rotated by their rows' angles, in a new tensor; saves no tensor for the backward."""
    result: torch.Tensor = _Rotate.apply(states_T1AD, table)
    return result


class _Rotate(torch.autograd.Function):
    """The rotation, whose gradient is the rotation by the opposite angles.

    It uses in-place products over halves: the usual x·cos + cat(−x₂, x₁)·sin makes four more copies of x.
    """

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, table: RotaryTable) -> torch.Tensor:
        ctx.table = table
        return _rotated(states, table, sign=1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        return _rotated(grad, ctx.table, sign=-1), None


def _rotated(states: torch.Tensor, table: RotaryTable, *, sign: int) -> torch.Tensor:
    half = states.shape[-1] // 2
    sin = table.sin_T11D[..., :half]
    turned = states * table.cos_T11D
    turned[..., :half].addcmul_(states[..., half:], sin, value=-sign)
    turned[..., half:].addcmul_(states[..., :half], sin, value=sign)
    return turned
