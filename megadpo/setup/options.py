"""Options of the model and the optimizer, from the configuration and what this machine offers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megadpo.config.choices import AttentionKernel, Backend, Fp8Backend, MomentDtype
from megadpo.config.schema import Config
from megadpo.errors import ConfigError
from megadpo.models import fp8_recipes
from megadpo.models.backend import transformer_engine_version, why_not_transformer_engine
from megadpo.models.builder import fuses_weight_gradients
from megadpo.models.fp8 import Fp8, unaligned_features, why_not_fp8
from megadpo.models.hf_config import Architecture
from megadpo.models.kernels import choose_attention
from megadpo.models.options import ModelOptions, PipelineSplit, Recompute
from megadpo.models.varlen import why_not_varlen
from megadpo.optimizer.build import DataParallelOptions, OptimizerOptions, adam_package, why_not_fused_adam
from megadpo.runtime.device import Device
from megadpo.runtime.parallel_state import ParallelState
from megadpo.runtime.rank_logging import get_logger
from megadpo.setup.backend import layer_backend, torch_dtype
from megadpo.setup.session import Session

logger = get_logger(__name__)

_MOMENT_DTYPES = {
    MomentDtype.fp32: torch.float32,
    MomentDtype.bf16: torch.bfloat16,
    MomentDtype.fp16: torch.float16,
    MomentDtype.fp8: torch.uint8,
}


def check_and_log_options(session: Session, *, trains: bool) -> None:
    """Logs what computes here; ConfigError, of everything at once, where this machine can't serve what is configured.

    The optimizer is looked at only where the session `trains`.
    """
    config, device = session.config, session.device
    models = [session.arch] if config.reference.hf_path is None else [session.arch, session.reference_arch]
    problems = [*fp8_problems(config, models, device), *(optimizer_problems(config, device) if trains else [])]
    if problems:
        raise ConfigError(problems)
    log_backend(config, device)
    log_attention(session)
    fp8 = fp8_settings(config)
    if fp8 is not None:
        how = "emulated: for the numbers, slower than without" if fp8.emulated else "by Transformer Engine"
        logger.info("fp8: recipe %s, format %s (%s)", fp8.recipe, fp8.format, how)
        for unaligned in _unaligned(fp8, models, config):
            logger.warning("fp8: Transformer Engine would refuse this model: the recipe %s", unaligned)


def log_attention(session: Session) -> None:
    """Logs the kernel of the model's attention, and why not the faster one; ConfigError as `choose_attention`."""
    kernel = _attention(session, session.arch)
    lacks = why_not_varlen(session.device, torch_dtype(session.config), session.arch.head_dim)
    asked = session.config.device.attention != AttentionKernel.auto
    logger.info("attention: %s%s", kernel, "" if asked or lacks is None else f" (varlen: {lacks})")


def log_backend(config: Config, device: Device) -> None:
    """Logs the kind of the layers, why they are not the faster ones, and which AdamW Megatron found."""
    backend = config.precision.backend
    if backend == Backend.transformer_engine:
        layers = f"transformer_engine {transformer_engine_version()}"
    else:
        lacks = why_not_transformer_engine(device, torch_dtype(config)) if device.kind == "cuda" else None
        layers = "native" if lacks is None else f"native (transformer_engine: {lacks})"
    added = "inside" if fuses_weight_gradients(str(backend)) else "after"
    logger.info(
        "layers: %s; weight gradients are added up %s the matrix product; AdamW is %s's", layers, added, adam_package()
    )


def optimizer_problems(config: Config, device: Device) -> list[str]:
    """The reasons why the configured optimizer can't work on `device` with the packages installed; [] if it can."""
    asked = {"precision_aware": config.optimizer.precision_aware, "cpu_offload": config.optimizer.cpu_offload}
    lacks = {key: why_not_fused_adam(device, with_formats=key == "precision_aware") for key in asked if asked[key]}
    return [f"optimizer.{key}=true: needs {what}: drop it" for key, what in lacks.items() if what is not None]


def fp8_settings(config: Config) -> Fp8 | None:
    """The configured FP8; None without."""
    precision = config.precision
    if precision.fp8 is None:
        return None
    recipe = str(precision.fp8)
    return Fp8(
        recipe=recipe,
        format=str(precision.fp8_format or fp8_recipes.default_format(recipe)),
        emulated=precision.fp8_backend == Fp8Backend.emulate,
        num_layers_at_start_in_bf16=precision.num_layers_at_start_in_bf16,
        num_layers_at_end_in_bf16=precision.num_layers_at_end_in_bf16,
        amax_history_len=precision.fp8_amax_history_len,
        amax_compute_algo=str(precision.fp8_amax_compute_algo),
    )


def fp8_problems(config: Config, models: Sequence[Architecture], device: Device) -> list[str]:
    """The reasons why the configured FP8 can't be computed on `device` for such models; [] if it can."""
    fp8 = fp8_settings(config)
    if fp8 is None or fp8.emulated:
        return []
    lacks = why_not_fp8(fp8, device, torch_dtype(config))
    return [
        f"precision.fp8={config.precision.fp8}: {problem}. precision.fp8_backend=emulate shows the recipe's effect on "
        "the numbers on any device; precision.fp8=null does without"
        for problem in (*([] if lacks is None else [lacks]), *_unaligned(fp8, models, config))
    ]


def _unaligned(fp8: Fp8, models: Sequence[Architecture], config: Config) -> list[str]:
    found = [unaligned_features(model, fp8.recipe, tensor=config.parallel.tensor) for model in models]
    return [problem for problem in dict.fromkeys(found) if problem is not None]


def model_options(session: Session, arch: Architecture, *, trained: bool = False) -> ModelOptions:
    """Options of a model of this architecture; only one that is trained has activations to compute again."""
    config = session.config
    return ModelOptions(
        device=session.device,
        dtype=torch_dtype(config),
        sequence_parallel=bool(config.parallel.sequence_parallel),
        backend=layer_backend(config, session.device),
        attention=_attention(session, arch),
        logits_mib=config.model.logits_mib,
        recompute=recomputation(config) if trained else Recompute(),
        split=pipeline_split(config),
        fp8=fp8_settings(config),
    )


def recomputation(config: Config) -> Recompute:
    """The activations that the backward of a trained model computes again."""
    model = config.model
    return Recompute(
        granularity=None if model.recompute_granularity is None else str(model.recompute_granularity),
        method=None if model.recompute_method is None else str(model.recompute_method),
        num_layers=model.recompute_num_layers,
        modules=tuple(map(str, model.recompute_modules or ())),
    )


def pipeline_split(config: Config) -> PipelineSplit:
    """Layers of the outer pipeline stages where others are configured than the rest has."""
    parallel = config.parallel
    return PipelineSplit(
        first=parallel.num_layers_in_first_pipeline_stage, last=parallel.num_layers_in_last_pipeline_stage
    )


def data_parallel_options(config: Config, state: ParallelState) -> DataParallelOptions:
    """The options of gradients' and weights' exchange; a lone data-parallel rank overlaps nothing, which is logged.

    That is no error: the number of data-parallel ranks is no key, it follows from how many ranks were started, and a
    configuration is to run, and a run to go on, on as many as there are.
    """
    parallel = config.parallel
    if parallel.overlap_grad_reduce and state.data_size == 1:
        logger.warning(
            "parallel.overlap_grad_reduce=true has no effect: one data-parallel rank exchanges nothing (more ranks "
            "than tensor x pipeline make more of them)"
        )
        return DataParallelOptions(grad_reduce_in_fp32=parallel.grad_reduce_in_fp32)
    return DataParallelOptions(
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        bucket_size=parallel.bucket_size,
        grad_reduce_in_fp32=parallel.grad_reduce_in_fp32,
    )


def optimizer_options(config: Config) -> OptimizerOptions:
    """The place of the optimizer's states, and their formats."""
    optimizer = config.optimizer
    return OptimizerOptions(
        precision_aware=optimizer.precision_aware,
        exp_avg_dtype=_MOMENT_DTYPES[optimizer.exp_avg_dtype],
        exp_avg_sq_dtype=_MOMENT_DTYPES[optimizer.exp_avg_sq_dtype],
        offload_fraction=optimizer.offload_fraction if optimizer.cpu_offload else 0.0,
        overlap_offload_copies=optimizer.overlap_cpu_optimizer_d2h_h2d,
    )


def _attention(session: Session, arch: Architecture) -> str:
    return choose_attention(
        str(session.config.device.attention),
        device=session.device,
        dtype=torch_dtype(session.config),
        head_dim=arch.head_dim,
    )
