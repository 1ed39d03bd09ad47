"""Requirements of layouts and FP8 recipes on token and feature counts: plain arithmetic, no imports of this package.

A recipe defines which values share a scale: under `tensorwise` and `delayed` a whole tensor (scaled by its own largest
value, or by those of earlier steps), under `blockwise` 128 values of activations and squares of 128 x 128 of weights,
under `mxfp8` 32 values.
"""

from __future__ import annotations

import math

# Values along the contraction of a matrix product that share a scale.
BLOCK_SIZES = {"blockwise": 128, "mxfp8": 32}
# Transformer Engine's matrix products take features in multiples of this under any recipe.
_KERNEL_FEATURES = 16
_KERNEL_ROWS = 16
_KERNEL_LOCAL_ROWS = 8


def default_format(recipe: str) -> str:
    """The number format that a recipe is meant for.

    With one scale per tensor, gradients need the wider range of e5m2 (`hybrid`); with one per block e4m3 is enough.
    """
    return "e4m3" if recipe in BLOCK_SIZES else "hybrid"


def token_multiple(recipe: str | None, *, tensor: int, context: int, sequence_parallel: bool) -> int:
    """The number that the tokens of a stream must be a multiple of, for its split and the recipe's FP8 matrix products.

    Weight gradients contract the rows of a context-parallel rank, in steps of 16 or of the recipe's block; under
    sequence parallelism each tensor rank's own rows are quantised too, in steps of 8 or of the block.
    """
    if recipe is None:
        return context * (tensor if sequence_parallel else 1)
    rows = BLOCK_SIZES.get(recipe, _KERNEL_ROWS)
    if sequence_parallel:
        rows = math.lcm(rows, BLOCK_SIZES.get(recipe, _KERNEL_LOCAL_ROWS) * tensor)
    return context * rows


def feature_multiple(recipe: str) -> int:
    """The number that input and output sizes of a rank's quantised matrices must be multiples of."""
    return BLOCK_SIZES.get(recipe, _KERNEL_FEATURES)
