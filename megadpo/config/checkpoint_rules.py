"""Rules of checkpoints: keeping them may only depend on steps that are saved and metrics that are evaluated."""

from __future__ import annotations

from megadpo.config.schema import Config

# Metrics of an evaluation by which checkpoints can be compared.
_METRICS = ("loss", "rewards/accuracies", "rewards/margins")


def check_checkpoints(config: Config) -> list[str]:
    """Violations of the keys about checkpoints, [] for none."""
    return [*_check_keep_every(config), *_check_keep_best(config)]


def _check_keep_every(config: Config) -> list[str]:
    every, save_every = config.checkpoint.keep_every, config.train.save_every
    if every is None or every < 1 or (save_every is not None and save_every >= 1 and every % save_every == 0):
        return []
    return [
        f"checkpoint.keep_every={every}: must be a multiple of train.save_every={save_every or 'null'}, only saved "
        "steps can be kept: change one of the two"
    ]


def _check_keep_best(config: Config) -> list[str]:
    best, train = config.checkpoint.keep_best, config.train
    if best is None:
        return []
    sets = list(config.data.validation_files()) or ([""] if config.data.validation_fraction else [])
    known = [f"eval/{name}/{metric}".replace("//", "/") for name in sets for metric in _METRICS]
    if not known:
        return [f"checkpoint.keep_best={best}: needs a validation set: give data.validation_path or drop it"]
    violations = []
    if best not in known:
        violations.append(f"checkpoint.keep_best={best}: must be one of {', '.join(known)}")
    if train.save_every is None or train.eval_every is None or train.save_every % max(1, train.eval_every):
        violations.append(
            f"checkpoint.keep_best={best}: needs an evaluation of every checkpoint: set train.save_every to a multiple "
            f"of train.eval_every={train.eval_every or 'null'}"
        )
    return violations
