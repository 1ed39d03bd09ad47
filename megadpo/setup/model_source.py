"""The source of a run's starting weights: a Hugging Face directory, or a Megatron checkpoint that stands alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megadpo.checkpoint.description import is_trained, read_training
from megadpo.checkpoint.directory import HF_DIRECTORY, find_checkpoint
from megadpo.config.schema import Config, ModelConfig

# The name that conf/model/hf.yaml gives to every model.
_ANY_MODEL = "hf"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The directory of configuration, tokenizer and side files; the weights are in `checkpoint` unless that is None."""

    hf_dir: Path
    checkpoint: Path | None


def resolve_model(config: Config) -> Config:
    """A copy in which `model.checkpoint` names the checkpoint itself, by its full path, and `model.name` the model.

    So that `latest`, links and the working directory are followed once: a run that goes on later must not start from
    another one. Raises CheckpointError.
    """
    model = config.model
    if model.checkpoint is not None:
        model = replace(model, checkpoint=str(find_checkpoint(Path(model.checkpoint)).resolve()))
    if model.name == _ANY_MODEL:
        model = replace(model, name=_own_name(model))
    return replace(config, model=model)


def _own_name(model: ModelConfig) -> str:
    """The name of a model that was named by its directory only: the run's that trained it, or the directory's."""
    if model.checkpoint is not None:
        directory = Path(model.checkpoint)
        if is_trained(directory):
            identity, _ = read_training(directory)
            return str(identity.settings.get("model.name", _ANY_MODEL))
        return directory.name
    return _ANY_MODEL if model.hf_path is None else directory_name(Path(model.hf_path))


def directory_name(directory: Path) -> str:
    """Name of a Hugging Face directory's model; in the Hub's cache, where directories are hashes, the repository's."""
    directory = directory.resolve()
    if directory.parent.name == "snapshots":
        return directory.parent.parent.name.rpartition("--")[2]
    return directory.name


def model_source(model: ModelConfig) -> ModelSource:
    """The source that a resolved configuration names."""
    if model.checkpoint is not None:
        return ModelSource(Path(model.checkpoint) / HF_DIRECTORY, Path(model.checkpoint))
    return ModelSource(Path(str(model.hf_path)), None)
