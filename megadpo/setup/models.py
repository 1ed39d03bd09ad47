"""Builds the pieces of a run from its Config: reference, policy, loss. Configuration objects stop here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megadpo.checkpoint.description import stored_dtype
from megadpo.checkpoint.state import load_checkpoint, load_weights
from megadpo.config.choices import Dtype, ReferenceMode
from megadpo.config.schema import Config
from megadpo.errors import ConfigError
from megadpo.models.builder import build_model, load_model
from megadpo.models.conversion.load_save import check_hf_weights
from megadpo.models.conversion.safetensors_io import hf_weight_files
from megadpo.models.hf_config import Architecture, read_architecture
from megadpo.models.policy import PolicyModel
from megadpo.models.quantised import count_quantised
from megadpo.optimizer.build import Policy, build_optimizer, wrap_data_parallel
from megadpo.reference import NoReference, OffloadedReference, Reference, ResidentReference
from megadpo.reference.key import CacheKey, cache_key, sampled_fingerprint
from megadpo.runtime.collectives import gather_rows, on_every
from megadpo.runtime.device import Device
from megadpo.runtime.parallel_state import ParallelState
from megadpo.runtime.rank_logging import get_logger
from megadpo.setup.model_source import ModelSource
from megadpo.setup.options import data_parallel_options, fp8_settings, model_options, optimizer_options, torch_dtype

logger = get_logger(__name__)

_REFERENCES = {ReferenceMode.resident: ResidentReference, ReferenceMode.offload: OffloadedReference}


def check_weight_files(config: Config, source: ModelSource, arch: Architecture) -> None:
    """Raises ConversionError where a model's files don't hold it, going by their headers; for one rank, no collectives.

    ConfigError for a reference that can't follow the policy. Takes no time, so that it can come before the data is
    tokenized.
    """
    if source.checkpoint is None:
        check_hf_weights(arch, source.hf_dir)
    own = config.reference.hf_path
    if own is not None:
        check_hf_weights(read_architecture(own), own)
    if config.reference.sync_every is not None and reference_architecture(config, arch) != arch:
        raise ConfigError(
            f"reference.sync_every={config.reference.sync_every}: mixes the policy's weights into the reference's, "
            f"reference.hf_path={own} is of another architecture: drop one of the two"
        )


def reference_architecture(config: Config, arch: Architecture) -> Architecture:
    """That of the reference's own directory, or the policy's."""
    own = config.reference.hf_path
    return arch if own is None else read_architecture(own)


def build_reference(
    config: Config, source: ModelSource, arch: Architecture, state: ParallelState, device: Device
) -> Reference:
    """The reference that computes while the policy trains, or that there is none; not a cached one."""
    if config.reference.mode == ReferenceMode.none:
        return NoReference(is_last_stage=state.is_last_stage, torch_device=device.torch_device)
    chunks = load_reference_model(config, source, arch, state, device)
    return _REFERENCES[config.reference.mode](chunks, torch_device=device.torch_device)


def load_reference_model(
    config: Config, source: ModelSource, arch: Architecture, state: ParallelState, device: Device
) -> list[PolicyModel]:
    """This rank's chunks of the reference: its own directory's weights, or the starting policy's."""
    own = config.reference.hf_path
    if own is None:
        return load_starting_model(config, source, arch, state, device)
    own_arch = read_architecture(own)
    chunks = load_model(own_arch, state, own, model_options(config, own_arch, device))
    _check_quantised(chunks, config, state, device)
    return chunks


def weight_files(source: ModelSource) -> list[Path]:
    """The files that a model's weights are read from. ConversionError where the directory has none."""
    if source.checkpoint is None:
        return hf_weight_files(source.hf_dir)
    return sorted(path for pattern in ("*.distcp", ".metadata") for path in source.checkpoint.glob(pattern))


def reference_key(config: Config, source: ModelSource, *, trust_index: bool = True) -> CacheKey:
    """What the reference's log-probs depend on; reads weight files whose hash is not known yet. For one process.

    Without `trust_index` it reads all of them.
    """
    reference = _reference_source(config, source)
    fp8 = fp8_settings(config)
    return cache_key(
        weight_files=weight_files(reference),
        config_file=reference.hf_dir / "config.json",
        tokenizer_dir=source.hf_dir,
        precision=str(config.precision.dtype) if fp8 is None else f"{config.precision.dtype}, {fp8}",
        index_dir=Path(str(config.reference.cache_dir)) if trust_index else None,
    )


def reference_fingerprint(config: Config, source: ModelSource) -> str:
    """What tells the reference's files from others, "" without a reference; for one process."""
    if config.reference.mode == ReferenceMode.none:
        return ""
    return sampled_fingerprint(weight_files(_reference_source(config, source)))


def _reference_source(config: Config, source: ModelSource) -> ModelSource:
    own = config.reference.hf_path
    return source if own is None else ModelSource(Path(own), checkpoint=None)


def load_starting_model(
    config: Config,
    source: ModelSource,
    arch: Architecture,
    state: ParallelState,
    device: Device,
    *,
    trained: bool = False,
) -> list[PolicyModel]:
    """This rank's chunks of the model with the weights that a run starts from, in the configured precision."""
    options = model_options(config, arch, device, trained=trained)
    if source.checkpoint is None:
        chunks = load_model(arch, state, source.hf_dir, options)
    else:
        if (stored_dtype(source.checkpoint), config.precision.dtype) == (Dtype.fp32, Dtype.bf16):
            logger.warning("%s: the weights are stored as fp32 and are rounded to bf16", source.checkpoint)
        chunks = build_model(arch, state, options)
        load_weights(source.checkpoint, chunks, vocab_size=arch.vocab_size)
    _check_quantised(chunks, config, state, device)
    return chunks


def build_policy(
    config: Config,
    source: ModelSource,
    arch: Architecture,
    state: ParallelState,
    device: Device,
    checkpoint: Path | None,
) -> Policy:
    """The policy with a checkpoint's weights and optimizer state, or with the weights that the run starts from."""
    if checkpoint is None:
        modules = load_starting_model(config, source, arch, state, device, trained=True)
    else:
        modules = build_model(arch, state, model_options(config, arch, device, trained=True))
        _check_quantised(modules, config, state, device)
    modules[-1].token_statistics = config.train.log_token_statistics
    chunks = wrap_data_parallel(modules, data_parallel_options(config, state))
    optimizer = build_optimizer(
        chunks,
        dtype=torch_dtype(config),
        lr=config.optimizer.lr,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
        clip_grad=config.optimizer.clip_grad,
        options=optimizer_options(config),
    )
    if checkpoint is not None:
        load_checkpoint(checkpoint, chunks, optimizer)
        logger.info("resumed from %s", checkpoint)
    return Policy(modules, chunks, optimizer)


def _check_quantised(chunks: Sequence[PolicyModel], config: Config, state: ParallelState, device: Device) -> None:
    """Says how many of a model's linear layers compute in FP8; ConfigError where it's not those that should.

    Collective over all ranks, which raise together.
    """
    fp8 = fp8_settings(config)
    if fp8 is None:
        return
    counts = on_every(lambda: count_quantised(chunks, fp8))
    rows = gather_rows(torch.tensor(counts, device=device.torch_device))
    quantised, linears = (rows.sum(dim=0) // (state.tensor_size * state.data_size)).tolist()
    logger.info("fp8: %d of the model's %d linear layers are quantised", quantised, linears)


def refers_to_start(config: Config) -> bool:
    """Whether the reference has the weights that the policy starts with."""
    own, start = config.reference.hf_path, config.model.hf_path
    return own is None or (start is not None and Path(own).samefile(start))
