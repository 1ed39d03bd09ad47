"""What layouts and FP8 recipes ask of tokens and features: plain arithmetic, no imports of this package.

A recipe says what shares a scale: `tensorwise` and `delayed` a whole tensor (by its own largest value, or by those of
earlier steps), `blockwise` 128 values of activations and squares of 128 x 128 of weights, `mxfp8` 32 values.
"""

from __future__ import annotations

import math

# Values along the contraction of a matrix product that share a scale.
BLOCK_SIZES = {"blockwise": 128, "mxfp8": 32}
# Transformer Engine's matrix products take features in multiples of this whatever the recipe.
_KERNEL_FEATURES = 16
_KERNEL_ROWS = 16
_KERNEL_LOCAL_ROWS = 8


def default_format(recipe: str) -> str:
    """Number formats that a recipe is meant for.

    With one scale a tensor gradients need the wider range of e5m2 (`hybrid`); a block's own scale leaves e4m3 enough.
    """
    return "e4m3" if recipe in BLOCK_SIZES else "hybrid"


def token_multiple(recipe: str | None, *, tensor: int, context: int, sequence_parallel: bool) -> int:
    """The tokens of a stream must be a multiple of this for its parts and, with a recipe, their FP8 matrix products.

    The rows of a context-parallel rank are contracted in weight gradients, in steps of 16 or of the recipe's block;
    under sequence parallelism each tensor rank's own rows are quantised too, in steps of 8 or of the block.
    """
    if recipe is None:
        return context * (tensor if sequence_parallel else 1)
    rows = BLOCK_SIZES.get(recipe, _KERNEL_ROWS)
    if sequence_parallel:
        rows = math.lcm(rows, BLOCK_SIZES.get(recipe, _KERNEL_LOCAL_ROWS) * tensor)
    return context * rows


def feature_multiple(recipe: str) -> int:
    """Input and output sizes of a rank's quantised matrices must be multiples of this."""
    return BLOCK_SIZES.get(recipe, _KERNEL_FEATURES)
