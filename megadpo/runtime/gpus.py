"""Rates and memory of GPUs by their data sheets: one table, for telemetry and for planning."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """Rates and memory of one kind of GPU.

    `bf16_tflops` and `fp8_tflops` are rates of dense matrix products (None: no such units). `memory_gib` is the total
    that CUDA reports, a little less than the advertised number. `nvlink_gb_per_s` is what one GPU can send to others of
    its machine, `network_gb_per_s` its share of the network in the vendor's own machines; both one way, in 10**9 bytes.
    CUDA's name of the device contains all of `words`. `compute_capability` is CUDA's.
    """

    words: tuple[str, ...]
    compute_capability: tuple[int, int]
    bf16_tflops: float
    fp8_tflops: float | None
    memory_gib: float
    memory_tb_per_s: float
    nvlink_gb_per_s: float
    network_gb_per_s: float


def _gpu(words: str, capability: tuple[int, int], *numbers: float | None) -> Gpu:
    bf16, fp8, gib, memory, nvlink, network = numbers
    assert bf16 and gib and memory and nvlink and network
    return Gpu(
        words=tuple(words.split()),
        compute_capability=capability,
        bf16_tflops=bf16,
        fp8_tflops=fp8,
        memory_gib=gib,
        memory_tb_per_s=memory,
        nvlink_gb_per_s=nvlink,
        network_gb_per_s=network,
    )


# By the name that `cluster.gpu` takes. Entries with more words come first, so that the first whose words fit is right.
# GPUs without NVLink between all of a machine's have their PCI Express rate instead.
GPUS = {
    "gb200": _gpu("GB200", (10, 0), 2500.0, 5000.0, 184.0, 8.0, 900.0, 50.0),
    "b200": _gpu("B200", (10, 0), 2250.0, 4500.0, 178.0, 8.0, 900.0, 50.0),
    "gh200": _gpu("GH200", (9, 0), 989.4, 1978.9, 94.0, 4.0, 450.0, 50.0),
    "h200_nvl": _gpu("H200 NVL", (9, 0), 835.5, 1671.0, 139.0, 4.8, 64.0, 50.0),
    "h200": _gpu("H200", (9, 0), 989.4, 1978.9, 139.0, 4.8, 450.0, 50.0),
    "h100_nvl": _gpu("H100 NVL", (9, 0), 835.5, 1671.0, 93.0, 3.9, 64.0, 50.0),
    "h100_pcie": _gpu("H100 PCIe", (9, 0), 756.0, 1513.0, 79.0, 2.0, 64.0, 50.0),
    "h100": _gpu("H100", (9, 0), 989.4, 1978.9, 79.0, 3.35, 450.0, 50.0),
    "h800": _gpu("H800", (9, 0), 989.4, 1978.9, 79.0, 3.35, 200.0, 50.0),
    "a100": _gpu("A100", (8, 0), 312.0, None, 79.0, 2.0, 300.0, 25.0),
    "a800": _gpu("A800", (8, 0), 312.0, None, 79.0, 2.0, 200.0, 25.0),
    "l40s": _gpu("L40S", (8, 9), 362.0, 733.0, 44.0, 0.864, 32.0, 25.0),
}


def find_gpu(device_name: str) -> tuple[str, Gpu] | None:
    """Name and data of the GPU that CUDA calls `device_name`; None if it is not in the table, or for a part (MIG)."""
    words = set(re.split(r"[\s-]+", device_name))
    if "MIG" in words:
        return None
    return next(((name, gpu) for name, gpu in GPUS.items() if words.issuperset(gpu.words)), None)
