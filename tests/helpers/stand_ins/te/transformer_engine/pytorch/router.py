"""Names of mixture-of-experts kernels that Megatron imports."""

from __future__ import annotations

from typing import Any


def _absent(*_: Any, **__: Any) -> None:
    raise NotImplementedError("mixtures of experts are not part of the stand-in")


fused_compute_score_for_moe_aux_loss = fused_moe_aux_loss = fused_topk_with_score_function = _absent
