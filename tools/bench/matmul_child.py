"""The machine as a contender: only the matrix products of a training step, at the model's shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.job import DTYPES, Job, Link, play_on_device
from megadpo.models.hf_config import Architecture, read_architecture
from megadpo.runtime.device import Device

# Rows of one product: a few sequences on CPU, where more would not be faster, and a full microbatch on a GPU.
_ROWS = {"cpu": 1500, "cuda": 8192}
_REPEATS = 3


@dataclass(frozen=True, slots=True)
class Product:
    """A linear layer over a number of rows, and its number in a step's microbatch."""

    name: str
    rows: int
    inputs: int
    outputs: int
    times: int

    @property
    def flops(self) -> int:
        """FLOPs of one product, in any of its three directions."""
        return 2 * self.rows * self.inputs * self.outputs


def products(arch: Architecture, *, rows: int, response_rows: int) -> list[Product]:
    """The linear layers of a model, as Megatron fuses them."""
    query, key_value = arch.num_attention_heads * arch.head_dim, arch.num_query_groups * arch.head_dim
    layers, hidden, ffn = arch.num_layers, arch.hidden_size, arch.ffn_hidden_size
    return [
        Product("qkv", rows, hidden, query + 2 * key_value, layers),
        Product("proj", rows, query, hidden, layers),
        Product("fc1", rows, hidden, 2 * ffn, layers),
        Product("fc2", rows, ffn, hidden, layers),
        Product("head", response_rows, hidden, arch.vocab_size, 1),
    ]


def step_seconds(product: Product, device: Device, dtype: torch.dtype) -> tuple[float, int]:
    """Measures (seconds, FLOPs) of a step's products of a layer: two forward, and one for each gradient."""

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device.torch_device, dtype=dtype)

    x, weight = tensor(product.rows, product.inputs), tensor(product.outputs, product.inputs)
    gradient = tensor(product.rows, product.outputs)
    forward = _seconds(lambda: torch.nn.functional.linear(x, weight), device)
    to_data = _seconds(lambda: gradient @ weight, device)
    to_weight = _seconds(lambda: gradient.T @ x, device)
    return product.times * (2 * forward + to_data + to_weight), product.times * 4 * product.flops


def _seconds(action: Callable[[], torch.Tensor], device: Device) -> float:
    """Seconds of one call, after a warm-up call."""
    action()
    started = device.mark()
    for _ in range(_REPEATS):
        action()
    return device.seconds_between(started, device.mark()) / _REPEATS


def response_share(tokens: Path) -> float:
    """Share of response rows in a stream in which a pair's prompt is shared."""
    lengths = [[len(part) for part in pair] for pair in json.loads(tokens.read_text(encoding="utf-8"))]
    return sum(chosen + rejected for _, chosen, rejected in lengths) / sum(map(sum, lengths))


def run(job: Job, link: Link, device: Device) -> None:
    """Measures on each request. Raises Finished at the end."""
    rows = _ROWS[job.device]
    response_rows = round(rows * response_share(Path(job.tokens)))
    layers = products(read_architecture(Path(job.model)), rows=rows, response_rows=response_rows)
    link.answer(ready=True)
    while True:
        link.wait()
        measured = [step_seconds(layer, device, DTYPES[job.dtype]) for layer in layers]
        seconds, flops = sum(s for s, _ in measured), sum(f for _, f in measured)
        by_layer = {layer.name: own / s for layer, (s, own) in zip(layers, measured, strict=True)}
        link.answer(seconds=seconds, flops_per_s=flops / seconds, by_layer=by_layer, peak_bytes=0)


if __name__ == "__main__":
    play_on_device(run)
