"""A stand-in for Transformer Engine: what megatron-core 0.16.1 imports of it and megadpo calls, in plain torch.

Strict: each signature is that of Transformer Engine 2.11 (tests/te compares them with the real ones), what the real
classes assert is asserted, what they leave unset is NaN, and everything else is missing. No FP8. Collectives are
Megatron's own, so that they run over gloo. It is found only by processes that are started with its directory on their
path.
"""

from . import common, pytorch

__all__ = ["__version__", "common", "pytorch"]
__version__ = "2.11.0"
