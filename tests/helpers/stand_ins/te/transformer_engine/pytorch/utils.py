"""What Transformer Engine tells of the machine."""

from __future__ import annotations


def get_cudnn_version() -> tuple[int, int, int]:
    return (9, 19, 0)
