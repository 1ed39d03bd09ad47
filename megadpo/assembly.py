"""Builds the pieces of a run from its Config: data, reference, policy, loss. Configuration objects stop here."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from megadpo.checkpoint import load_checkpoint
from megadpo.config.schema import Config, Dtype, ReferenceMode
from megadpo.data.batch import stream_length
from megadpo.data.dataset import RawPair, read_pairs, split_validation
from megadpo.data.loader import BatchShape
from megadpo.data.tokenization import (
    TokenizedPair,
    check_vocabulary,
    describe_pair,
    load_tokenizer,
    tokenize_pairs,
)
from megadpo.device import Device
from megadpo.losses import PreferenceLoss
from megadpo.models.builder import ModelOptions, build_model, load_model
from megadpo.models.hf_config import Architecture, read_architecture
from megadpo.optimizer import LearningRate, Policy, build_optimizer, wrap_data_parallel
from megadpo.parallel.state import ParallelState
from megadpo.rank_logging import get_logger
from megadpo.reference import Reference, ResidentReference
from megadpo.trainer import LoopSettings

logger = get_logger(__name__)


_REFERENCES = {ReferenceMode.resident: ResidentReference}
# From here on tokenizing takes long enough that a person wants to see it move.
_MANY_PAIRS = 5000
_DTYPES = {Dtype.bf16: torch.bfloat16, Dtype.fp32: torch.float32}


@dataclass(frozen=True, slots=True)
class Datasets:
    """Retained pairs for training and for each validation set, and the pad token."""

    train: list[TokenizedPair]
    validation: dict[str, list[TokenizedPair]]
    pad_token_id: int

    @property
    def digests(self) -> dict[str, str]:
        """Hash of each set's token ids, under `train` and `eval/NAME`."""
        named = {"train": self.train, **{f"eval/{name}": pairs for name, pairs in self.validation.items()}}
        return {name: _digest(pairs) for name, pairs in named.items()}


def torch_dtype(config: Config) -> torch.dtype:
    """Number format of weights and activations."""
    return _DTYPES[config.precision.dtype]


def load_datasets(config: Config, arch: Architecture) -> Datasets:
    """Reads, splits and tokenizes everything; every rank does the same work and gets the same pairs."""
    tokenizer = load_tokenizer(str(config.model.hf_path))
    keys = {
        "prompt_key": config.data.prompt_key,
        "chosen_key": config.data.chosen_key,
        "rejected_key": config.data.rejected_key,
    }
    raw: dict[str, list[RawPair]] = {
        name: read_pairs([path], **keys).pairs for name, path in config.data.validation_files().items()
    }
    train_raw = read_pairs(config.data.train_path, **keys).pairs
    if config.data.validation_fraction > 0:
        train_raw, raw[""] = split_validation(train_raw, config.data.validation_fraction, config.train.seed)

    def tokenized(name: str, pairs: list[RawPair]) -> list[TokenizedPair]:
        retained = tokenize_pairs(
            pairs,
            tokenizer,
            max_length=config.data.max_length,
            truncation=str(config.data.truncation),
            name=name,
            progress=len(pairs) >= _MANY_PAIRS,
        ).pairs
        check_vocabulary(retained, arch.vocab_size)
        return retained

    train = tokenized("training", train_raw)
    validation = {name: tokenized(f"validation {name}".strip(), pairs) for name, pairs in raw.items()}
    logger.info("the first training pair as the model sees it:\n%s", describe_pair(train[0], tokenizer))
    longest = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in train)
    if longest > arch.max_position_embeddings:
        logger.warning(
            "the longest sequence has %d tokens, the model was made for %d: lower data.max_length",
            longest,
            arch.max_position_embeddings,
        )
    budget = config.data.tokens_per_microbatch
    oversized = sum(stream_length(pair) > budget for pair in train)
    if oversized:
        logger.warning(
            "%d of %d pairs are longer than data.tokens_per_microbatch=%d; each gets a microbatch of its own, which "
            "takes more memory than the budget says",
            oversized,
            len(train),
            budget,
        )
    return Datasets(train=train, validation=validation, pad_token_id=int(tokenizer.pad_token_id))


def _digest(pairs: list[TokenizedPair]) -> str:
    """Hash of all token ids in order, with their lengths, so that no two cuts of the same tokens are alike."""
    sha = hashlib.sha256()
    for pair in pairs:
        for ids in (pair.prompt, pair.chosen, pair.rejected):
            sha.update(len(ids).to_bytes(4, "little"))
            sha.update(ids.tobytes())
    return sha.hexdigest()


def batch_shape(state: ParallelState, *, sequence_parallel: bool) -> BatchShape:
    """What the layout asks of a batch."""
    return BatchShape(
        data_rank=state.data_rank,
        data_size=state.data_size,
        token_multiple=state.tensor_size if sequence_parallel else 1,
        fixed_streams=state.pipeline_size > 1,
        microbatch_multiple=state.pipeline_size if state.virtual_pipeline_size > 1 else 1,
    )


def build_reference(config: Config, arch: Architecture, state: ParallelState, device: Device) -> Reference:
    """The frozen reference: its own directory's weights, or the starting policy's."""
    path = Path(str(config.reference.hf_path or config.model.hf_path))
    reference_arch = arch if config.reference.hf_path is None else read_architecture(path)
    chunks = load_model(reference_arch, state, path, **_model_options(config, device))
    return _REFERENCES[config.reference.mode](chunks, device=device.torch_device)


def _model_options(config: Config, device: Device) -> ModelOptions:
    return {
        "device": device,
        "dtype": torch_dtype(config),
        "sequence_parallel": bool(config.parallel.sequence_parallel),
    }


def build_policy(
    config: Config, arch: Architecture, state: ParallelState, device: Device, checkpoint: Path | None
) -> Policy:
    """The policy with a checkpoint's weights and optimizer state, or with the Hugging Face weights of model.hf_path."""
    options = _model_options(config, device)
    if checkpoint is None:
        modules = load_model(arch, state, str(config.model.hf_path), **options)
    else:
        modules = build_model(arch, state, **options)
    chunks = wrap_data_parallel(modules)
    optimizer = build_optimizer(
        chunks,
        dtype=torch_dtype(config),
        lr=config.optimizer.lr,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
        clip_grad=config.optimizer.clip_grad,
    )
    if checkpoint is not None:
        load_checkpoint(checkpoint, chunks, optimizer)
        logger.info("resumed from %s", checkpoint)
    return Policy(modules, chunks, optimizer)


def build_loss(config: Config) -> PreferenceLoss:
    """The loss of a pair."""
    return PreferenceLoss(
        name=str(config.loss.name[0]),
        beta=config.loss.beta,
        label_smoothing=config.loss.label_smoothing,
        ipo_length_normalize=config.loss.ipo_length_normalize,
    )


def loop_settings(config: Config, loss: PreferenceLoss, total_steps: int) -> LoopSettings:
    """When to log, evaluate and save, the learning rate, and what the first loss must be."""
    own = config.reference.hf_path
    reference_is_start = own is None or Path(own).samefile(str(config.model.hf_path))
    return LoopSettings(
        total_steps=total_steps,
        log_every=config.train.log_every,
        eval_every=config.train.eval_every,
        save_every=config.train.save_every,
        learning_rate=LearningRate(
            peak=config.optimizer.lr,
            minimum=config.optimizer.min_lr,
            schedule=str(config.optimizer.schedule),
            warmup_steps=config.optimizer.warmup_steps,
            total_steps=total_steps,
        ),
        value_without_preference=loss.value_without_preference if reference_is_start else None,
    )
