"""Where a run's starting weights come from: a Hugging Face directory, or a Megatron checkpoint that stands alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megadpo.checkpoint_files import HF_DIRECTORY, find_checkpoint
from megadpo.config.schema import Config, ModelConfig


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Configuration, tokenizer and side files are in `hf_dir`; weights too, unless `checkpoint` holds them."""

    hf_dir: Path
    checkpoint: Path | None


def resolve_checkpoint(config: Config) -> Config:
    """A copy in which `model.checkpoint` names the checkpoint itself, found on this machine's disk, by its full path.

    So that `latest`, links and the working directory are followed once: a run that goes on later must not start from
    another one. Raises CheckpointError.
    """
    if config.model.checkpoint is None:
        return config
    found = find_checkpoint(Path(config.model.checkpoint))
    return replace(config, model=replace(config.model, checkpoint=str(found.resolve())))


def model_source(model: ModelConfig) -> ModelSource:
    """The source that a resolved configuration names."""
    if model.checkpoint is not None:
        return ModelSource(Path(model.checkpoint) / HF_DIRECTORY, Path(model.checkpoint))
    return ModelSource(Path(str(model.hf_path)), None)
