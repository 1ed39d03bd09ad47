"""The rows of the ablation: the program with some of its parts switched off. `ablation_patches` does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """The parts of the program that are in use."""

    packed: bool = True
    share_prompt: bool = True
    response_rows: bool = True
    fused_head: bool = True
    cached_reference: bool = False

    @property
    def overrides(self) -> tuple[str, ...]:
        """The settings that the configuration has for it."""
        return () if self.share_prompt else ("data.share_prompt=false",)


# Each row adds one part to the row before it; the last but one is the program as it is.
ABLATIONS: Mapping[str, Ablation] = {
    "padded": Ablation(packed=False, share_prompt=False, response_rows=False, fused_head=False),
    "packed": Ablation(share_prompt=False, response_rows=False, fused_head=False),
    "+ sharing": Ablation(response_rows=False, fused_head=False),
    "+ response rows": Ablation(fused_head=False),
    "+ fused head": Ablation(),
    "+ cached reference": Ablation(cached_reference=True),
}
