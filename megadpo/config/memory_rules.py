"""Rules of the keys that trade memory, time and rounding: recomputation, exchanges, optimizer states, uneven stages.

Every function returns its violations, [] for none; `validation.py` collects them.
"""

from __future__ import annotations

from megadpo.config.choices import DeviceKind, Dtype, MomentDtype, RecomputeGranularity, RecomputeMethod
from megadpo.config.schema import Config, ModelConfig, OptimizerConfig, ParallelConfig, show

# Relative change of a number that is lost to rounding: half a unit in the last place, for a number just above a power
# of two.
_LOST_TO_ROUNDING = {MomentDtype.fp16: 2**-11, MomentDtype.bf16: 2**-8, MomentDtype.fp8: 2**-4}


def check_memory_keys(config: Config) -> list[str]:
    """Violations of the keys of this file that do not depend on the model."""
    return [
        *_check_recompute(config.model),
        *_check_split(config.parallel),
        *_check_exchanges(config),
        *_check_states(config),
    ]


def check_pipeline_split(config: Config, num_layers: int, what: str, *, trained: bool) -> list[str]:
    """Reasons why `num_layers` layers of the model `what` can't be split into the pipeline's stages and chunks.

    If the model is trained, recomputation, which counts the layers of a chunk, is checked too.
    """
    parallel = config.parallel
    if parallel.pipeline == 1:
        return _check_recomputed_layers(config.model, {num_layers}) if trained else []
    chunks = parallel.virtual_pipeline or 1
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    outer = [layers for layers in (first, last) if layers is not None]
    others, left = parallel.pipeline - len(outer), num_layers - sum(outer)
    if others < 1:
        return []  # reported by `_check_split`
    if left >= others * chunks and left % (others * chunks) == 0:
        inner = left // (others * chunks)
        sizes = {*(layers // chunks for layers in outer), inner}
        return _check_recomputed_layers(config.model, sizes) if trained else []
    key = f"parallel.pipeline={parallel.pipeline}"
    if chunks > 1:
        key += f", parallel.virtual_pipeline={chunks}"
    if not outer:
        return [
            f"{key}: {others * chunks} equal parts cannot be cut from the {what}'s {num_layers} layers: use "
            f"{'a product' if chunks > 1 else 'a number'} that divides {num_layers}, or give the first or last stage "
            "another number of them (parallel.num_layers_in_first_pipeline_stage, ..._in_last_pipeline_stage)"
        ]
    return [
        f"{_split_keys(parallel)}, {key}: {max(left, 0)} of the {what}'s {num_layers} layers are left for {others} "
        f"other {'stage' if others == 1 else 'stages'}, which must be a multiple of {others * chunks}, and not 0: "
        "choose other numbers"
    ]


def _split_keys(parallel: ParallelConfig) -> str:
    named = {
        "first": parallel.num_layers_in_first_pipeline_stage,
        "last": parallel.num_layers_in_last_pipeline_stage,
    }
    return ", ".join(
        f"parallel.num_layers_in_{end}_pipeline_stage={layers}" for end, layers in named.items() if layers is not None
    )


def _check_recompute(model: ModelConfig) -> list[str]:
    granularity = model.recompute_granularity
    violations = []
    only_for = {
        "method": (model.recompute_method, RecomputeGranularity.full),
        "num_layers": (model.recompute_num_layers, RecomputeGranularity.full),
        "modules": (model.recompute_modules, RecomputeGranularity.selective),
    }
    for name, (value, needed) in only_for.items():
        if value is not None and granularity != needed:
            violations.append(
                f"model.recompute_{name}={show(value)}: has no effect with model.recompute_granularity="
                f"{show(granularity)}: drop it, or use model.recompute_granularity={needed}"
            )
    modules = model.recompute_modules
    if modules is not None and len(set(modules)) != max(len(modules), 1):
        violations.append(
            f"model.recompute_modules={show(modules)}: must name at least one part, and each once: "
            "model.recompute_modules=[core_attn]"
        )
    return violations


def _check_recomputed_layers(model: ModelConfig, layers_of_chunks: set[int]) -> list[str]:
    number = model.recompute_num_layers
    if number is None or number < 1 or model.recompute_granularity != RecomputeGranularity.full:
        return []
    sizes = " and ".join(map(str, sorted(layers_of_chunks)))
    key = f"model.recompute_num_layers={number}"
    if model.recompute_method == RecomputeMethod.block:
        if number <= max(layers_of_chunks):
            return []
        return [f"{key}: a chunk of the model has {sizes} layers, so it must be at most {max(layers_of_chunks)}"]
    if all(layers % number == 0 for layers in layers_of_chunks):
        return []
    return [
        f"{key}: must divide the {sizes} layers of the model's chunks with model.recompute_method=uniform: use 1, or "
        "method block"
    ]


def _check_split(parallel: ParallelConfig) -> list[str]:
    violations = []
    outer = _split_keys(parallel)
    if outer and parallel.pipeline < 2:
        violations.append(f"{outer}: needs parallel.pipeline >= 2, it is {parallel.pipeline}: raise it or drop the key")
    elif outer.count("=") == 2 and parallel.pipeline == 2:
        violations.append(f"{outer}: with parallel.pipeline=2 one of them says what the other must be: drop one")
    chunks = parallel.virtual_pipeline or 1
    for layers in (parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage):
        if layers is not None and chunks > 1 and layers % chunks:
            violations.append(
                f"{outer}: a stage of {layers} layers cannot be cut into parallel.virtual_pipeline={chunks} equal "
                f"chunks: use a multiple of {chunks}"
            )
    return violations


def _check_exchanges(config: Config) -> list[str]:
    parallel = config.parallel
    violations = []
    if not parallel.overlap_grad_reduce:
        if parallel.overlap_param_gather:
            violations.append(
                "parallel.overlap_param_gather=true: needs parallel.overlap_grad_reduce=true: set it, or drop both"
            )
        if parallel.bucket_size is not None:
            violations.append(
                f"parallel.bucket_size={parallel.bucket_size}: has no effect without "
                "parallel.overlap_grad_reduce=true: set it, or drop bucket_size"
            )
    if not parallel.grad_reduce_in_fp32 and config.precision.dtype == Dtype.fp32:
        violations.append(
            "parallel.grad_reduce_in_fp32=false: has no effect with precision.dtype=fp32, whose gradients are fp32: "
            "drop it"
        )
    return violations


def _check_states(config: Config) -> list[str]:
    optimizer = config.optimizer
    violations = [*_check_moments(optimizer), *_check_offload(optimizer)]
    for key, asked in (("precision_aware", optimizer.precision_aware), ("cpu_offload", optimizer.cpu_offload)):
        if asked and config.device.kind == DeviceKind.cpu:
            violations.append(f"optimizer.{key}=true: needs CUDA, it is device.kind=cpu: drop it")
    if optimizer.cpu_offload and config.precision.dtype == Dtype.fp32:
        violations.append(
            "optimizer.cpu_offload=true: needs precision.dtype=bf16, it is fp32: Megatron-Core offloads main weights, "
            "which an fp32 model does not have: drop it"
        )
    if optimizer.precision_aware and optimizer.cpu_offload:
        violations.append(
            "optimizer.precision_aware=true, optimizer.cpu_offload=true: the host keeps main weights and moments in "
            "fp32, so the formats would have no effect: drop one of the two"
        )
    return violations


def _check_moments(optimizer: OptimizerConfig) -> list[str]:
    violations = []
    formats = {"exp_avg_dtype": optimizer.exp_avg_dtype, "exp_avg_sq_dtype": optimizer.exp_avg_sq_dtype}
    for (key, dtype), beta in zip(formats.items(), optimizer.betas, strict=True):
        if dtype == MomentDtype.fp32:
            continue
        if not optimizer.precision_aware:
            violations.append(
                f"optimizer.{key}={dtype}: has no effect without optimizer.precision_aware=true: set it, or drop {key}"
            )
        if 0 <= beta < 1 and 1 - beta < _LOST_TO_ROUNDING[dtype]:
            violations.append(
                f"optimizer.{key}={dtype}: an update with beta={beta:g} changes the mean by a share of {1 - beta:.2g}, "
                f"which {dtype} rounds away below {_LOST_TO_ROUNDING[dtype]:.2g}: the mean would stand still. Use a "
                "finer format (fp32, fp16), or a smaller beta (optimizer.betas)"
            )
    return violations


def _check_offload(optimizer: OptimizerConfig) -> list[str]:
    violations = []
    if 0 < optimizer.offload_fraction < 1 and not optimizer.cpu_offload:
        violations.append(
            f"optimizer.offload_fraction={show(optimizer.offload_fraction)}: has no effect without "
            "optimizer.cpu_offload=true: set it, or drop offload_fraction"
        )
    if optimizer.overlap_cpu_optimizer_d2h_h2d and not optimizer.cpu_offload:
        violations.append(
            "optimizer.overlap_cpu_optimizer_d2h_h2d=true: has no effect without optimizer.cpu_offload=true: set it, "
            "or drop overlap_cpu_optimizer_d2h_h2d"
        )
    return violations
