"""Rules of FP8: settings that go with a recipe, and its requirements on tokens. The machine is checked elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from operator import attrgetter

from megadpo.config.choices import Backend, DeviceKind, Dtype, Fp8Backend, Fp8Recipe, ReferenceMode
from megadpo.config.schema import Config, PrecisionConfig, show
from megadpo.models.fp8_recipes import token_multiple

_DELAYED_ONLY = ("fp8_amax_history_len", "fp8_amax_compute_algo")
_WITHOUT_FP8 = ("dtype", "backend", "fp8")


def check_fp8(config: Config, *, num_layers: Sequence[int]) -> list[str]:
    """Violations of the keys about FP8; `num_layers` holds the policy's and its reference's, as far as known."""
    precision = config.precision
    recipe = precision.fp8
    changed = [item.name for item in fields(PrecisionConfig) if attrgetter(item.name)(precision) != item.default]
    if recipe is None:
        inert = [name for name in changed if name not in _WITHOUT_FP8]
        return [_inert(precision, name, "precision.fp8=null", "or choose a recipe") for name in inert]
    violations = []
    if recipe != Fp8Recipe.delayed:
        violations += [
            _inert(precision, name, f"precision.fp8={recipe}", "or use precision.fp8=delayed")
            for name in _DELAYED_ONLY
            if name in changed
        ]
    if precision.fp8_check_every is None and "fp8_check_pairs" in changed:
        violations.append(_inert(precision, "fp8_check_pairs", "precision.fp8_check_every=null", "or set that"))
    return violations + _check_backend(config) + _check_recipe(config, num_layers) + _check_tokens(config)


def _check_backend(config: Config) -> list[str]:
    asked = f"precision.fp8_backend={config.precision.fp8_backend}"
    if config.precision.fp8_backend == Fp8Backend.emulate:
        if config.precision.backend == Backend.transformer_engine:
            return [f"{asked}: needs native layers, it is precision.backend=transformer_engine: use native or auto"]
        return []
    violations = []
    if config.precision.backend == Backend.native:
        violations.append(f"{asked}: needs its layers, it is precision.backend=native: use precision.backend=auto")
    if config.precision.dtype == Dtype.fp32:
        violations.append(
            f"precision.fp8={config.precision.fp8}: Transformer Engine's FP8 needs precision.dtype=bf16, it is fp32: "
            "use bf16, or precision.fp8_backend=emulate"
        )
    if config.device.kind == DeviceKind.cpu:
        violations.append(
            f"precision.fp8={config.precision.fp8}: needs CUDA with Transformer Engine, it is device.kind=cpu: "
            "precision.fp8_backend=emulate shows the recipe's effect on the numbers here"
        )
    return violations


def _check_recipe(config: Config, num_layers: Sequence[int]) -> list[str]:
    precision = config.precision
    start, end = precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16
    named = f"precision.num_layers_at_start_in_bf16={start}, precision.num_layers_at_end_in_bf16={end}"
    violations = []
    if precision.fp8 == Fp8Recipe.delayed:
        if config.reference.mode != ReferenceMode.none:
            violations.append(
                f"precision.fp8=delayed: does not go with reference.mode={config.reference.mode}: its scales follow "
                "the passes that a model has made, so a reference would be quantised unlike the policy and step 1 "
                "could not be exact, nor could scores: use precision.fp8=tensorwise"
            )
        if start or end:
            violations.append(
                f"{named}: delayed scaling keeps its scales for all layers together: leave them at 0, or use "
                "precision.fp8=tensorwise"
            )
    if precision.fp8 == Fp8Recipe.tensorwise and config.reference.mode == ReferenceMode.cached:
        violations.append(
            "precision.fp8=tensorwise: does not go with reference.mode=cached: all tokens of a microbatch share a "
            "scale, so that log-probs would belong to a packing: use precision.fp8=blockwise or mxfp8, or "
            "reference.mode=resident or offload (in scoring: no reference.cache_dir)"
        )
    if min(start, end) < 0 or config.parallel.pipeline < 1:
        return violations
    for layers in dict.fromkeys(num_layers):
        per_stage = layers // config.parallel.pipeline
        if max(start, end) > per_stage:
            violations.append(f"{named}: each must be at most the {per_stage} layers of a pipeline stage: lower them")
        if start + end >= layers:
            violations.append(f"{named}: leave none of a model's {layers} layers for FP8: lower them")
    return violations


def _check_tokens(config: Config) -> list[str]:
    tensor, budget = config.parallel.tensor, config.data.tokens_per_microbatch
    if tensor < 1 or budget < 1:
        return []
    multiple = token_multiple(
        str(config.precision.fp8),
        tensor=tensor,
        context=1,
        sequence_parallel=config.parallel.uses_sequence_parallelism(),
    )
    if budget % multiple == 0:
        return []
    near = [str(tokens) for tokens in (budget // multiple * multiple, -(-budget // multiple) * multiple) if tokens]
    return [
        f"data.tokens_per_microbatch={budget}: must be a multiple of {multiple} tokens with "
        f"precision.fp8={config.precision.fp8} at parallel.tensor={tensor}, to which streams are padded: use "
        f"{' or '.join(near)}"
    ]


def _inert(precision: PrecisionConfig, name: str, why: str, otherwise: str) -> str:
    return f"precision.{name}={show(attrgetter(name)(precision))}: has no effect with {why}: drop it, {otherwise}"
