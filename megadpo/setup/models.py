"""Builds the models of a session: the policy with its optimizer, and the reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megadpo.checkpoint.description import stored_dtype
from megadpo.checkpoint.state import load_checkpoint, load_reference, load_weights
from megadpo.config.choices import Dtype, ReferenceMode
from megadpo.config.schema import Config
from megadpo.errors import ConfigError
from megadpo.models.builder import build_model, load_model
from megadpo.models.conversion.load_save import check_hf_weights
from megadpo.models.conversion.safetensors_io import hf_weight_files
from megadpo.models.policy import PolicyModel
from megadpo.models.quantised import count_quantised
from megadpo.optimizer.build import Policy, build_optimizer, wrap_data_parallel
from megadpo.reference import NoReference, OffloadedReference, Reference, ResidentReference
from megadpo.reference.key import CacheKey, cache_key, sampled_fingerprint
from megadpo.runtime.collectives import gather_rows, on_every
from megadpo.runtime.rank_logging import get_logger
from megadpo.setup.backend import torch_dtype
from megadpo.setup.model_source import ModelSource
from megadpo.setup.options import data_parallel_options, fp8_settings, model_options, optimizer_options
from megadpo.setup.session import Session

logger = get_logger(__name__)

_REFERENCES = {ReferenceMode.resident: ResidentReference, ReferenceMode.offload: OffloadedReference}


def check_weight_files(session: Session) -> None:
    """Raises ConversionError where a model's files don't hold it, going by their headers; for one rank, no collectives.

    ConfigError for a reference that can't follow the policy. Takes no time, so that it can come before the data is
    tokenized.
    """
    if session.source.checkpoint is None:
        check_hf_weights(session.arch, session.source.hf_dir)
    reference = session.config.reference
    if reference.hf_path is not None:
        check_hf_weights(session.reference_arch, reference.hf_path)
    if reference.sync_every is not None and session.reference_arch != session.arch:
        raise ConfigError(
            f"reference.sync_every={reference.sync_every}: mixes the policy's weights into the reference's, "
            f"reference.hf_path={reference.hf_path} is of another architecture: drop one of the two"
        )


def build_policy(session: Session, checkpoint: Path | None) -> Policy:
    """The policy with a checkpoint's weights and optimizer state, or with the weights that the run starts from."""
    config, arch = session.config, session.arch
    if checkpoint is None:
        modules = load_starting_model(session, trained=True)
    else:
        modules = build_model(arch, session.state, model_options(session, arch, trained=True))
        _check_quantised(modules, session)
    modules[-1].token_statistics = config.train.log_token_statistics
    chunks = wrap_data_parallel(modules, data_parallel_options(config, session.state))
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


def build_reference(session: Session, checkpoint: Path | None) -> Reference:
    """The live reference, or NoReference; a cached one comes from `build_cached_reference`.

    One that follows the policy has the weights that it had when `checkpoint` was saved, where one is given.
    """
    config, torch_device = session.config.reference, session.device.torch_device
    if config.mode == ReferenceMode.none:
        return NoReference(is_last_stage=session.state.is_last_stage, torch_device=torch_device)
    follows = config.sync_every is not None
    reference = _REFERENCES[config.mode](load_reference_model(session), torch_device=torch_device, follows=follows)
    if checkpoint is not None and follows:
        with reference.weights(change=True):
            load_reference(checkpoint, reference.chunks)
    return reference


def load_starting_model(session: Session, *, trained: bool = False) -> list[PolicyModel]:
    """This rank's chunks of the model with the weights that a run starts from, in the configured precision."""
    source, arch, state = session.source, session.arch, session.state
    options = model_options(session, arch, trained=trained)
    if source.checkpoint is None:
        chunks = load_model(arch, state, source.hf_dir, options)
    else:
        if (stored_dtype(source.checkpoint), session.config.precision.dtype) == (Dtype.fp32, Dtype.bf16):
            logger.warning("%s: the weights are stored as fp32 and are rounded to bf16", source.checkpoint)
        chunks = build_model(arch, state, options)
        load_weights(source.checkpoint, chunks, vocab_size=arch.vocab_size)
    _check_quantised(chunks, session)
    return chunks


def load_reference_model(session: Session) -> list[PolicyModel]:
    """This rank's chunks of the reference: its own directory's weights, or the starting policy's."""
    if session.config.reference.hf_path is None:
        return load_starting_model(session)
    arch = session.reference_arch
    chunks = load_model(arch, session.state, session.reference_source.hf_dir, model_options(session, arch))
    _check_quantised(chunks, session)
    return chunks


def weight_files(source: ModelSource) -> list[Path]:
    """The files that a model's weights are read from. ConversionError where the directory has none."""
    if source.checkpoint is None:
        return hf_weight_files(source.hf_dir)
    return sorted(path for pattern in ("*.distcp", ".metadata") for path in source.checkpoint.glob(pattern))


def reference_key(session: Session, *, trust_index: bool = True) -> CacheKey:
    """The key of everything that the reference's log-probs depend on; for one process.

    Reads weight files whose hash is not known yet; without `trust_index` it reads all of them.
    """
    config, source = session.config, session.reference_source
    fp8 = fp8_settings(config)
    return cache_key(
        weight_files=weight_files(source),
        config_file=source.hf_dir / "config.json",
        tokenizer_dir=session.source.hf_dir,
        precision=str(config.precision.dtype) if fp8 is None else f"{config.precision.dtype}, {fp8}",
        index_dir=Path(str(config.reference.cache_dir)) if trust_index else None,
    )


def reference_fingerprint(session: Session) -> str:
    """A fingerprint of the reference's files, "" without a reference; for one process."""
    if session.config.reference.mode == ReferenceMode.none:
        return ""
    return sampled_fingerprint(weight_files(session.reference_source))


def refers_to_start(config: Config) -> bool:
    """True if the reference has the weights that the policy starts with."""
    own, start = config.reference.hf_path, config.model.hf_path
    return own is None or (start is not None and Path(own).samefile(start))


def _check_quantised(chunks: Sequence[PolicyModel], session: Session) -> None:
    """Logs how many of a model's linear layers compute in FP8; ConfigError where they are not those that should.

    Collective over all ranks, which raise together.
    """
    fp8, state = fp8_settings(session.config), session.state
    if fp8 is None:
        return
    counts = on_every(lambda: count_quantised(chunks, fp8))
    rows = gather_rows(torch.tensor(counts, device=session.device.torch_device))
    quantised, linears = (rows.sum(dim=0) // (state.tensor_size * state.data_size)).tolist()
    logger.info("fp8: %d of the model's %d linear layers are quantised", quantised, linears)
