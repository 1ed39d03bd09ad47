"""Rules beyond types: ranges, keys that depend on each other, files that must exist, layouts that must fit.

Every violation of a configuration is collected and raised as one ConfigError; nothing is edited. A knob that would have
no effect is a violation like any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from operator import attrgetter
from pathlib import Path

from megadpo.config.checkpoint_rules import check_checkpoints
from megadpo.config.choices import AttentionKernel, Backend, DeviceKind, Dtype, Schedule, TrackerName
from megadpo.config.cluster_rules import check_cluster
from megadpo.config.data_rules import check_data, demo_remedy
from megadpo.config.fp8_rules import check_fp8
from megadpo.config.loss_rules import check_loss
from megadpo.config.memory_rules import check_memory_keys, check_pipeline_split
from megadpo.config.reference_rules import check_reference_keys
from megadpo.config.schema import Config, show
from megadpo.errors import ConfigError, redact, secret_variables


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes of a model that limit its layouts, and the vocabulary, which a reference must share."""

    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int
    vocab_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Range:
    """A range of finite numbers: `low` is included unless `above`, `high` is excluded unless `to`."""

    low: float
    high: float = math.inf
    above: bool = False
    to: bool = False

    def __contains__(self, value: float) -> bool:
        below = value <= self.high if self.to else value < self.high
        return self.low <= value and below and not (self.above and value == self.low)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"a finite number {'>' if self.above else '>='} {self.low}"
        return f"in {'(' if self.above else '['}{self.low}, {self.high}{']' if self.to else ')'}"


_RANGES = {
    "model.logits_mib": _Range(low=1),
    "model.recompute_num_layers": _Range(low=1),
    "data.validation_fraction": _Range(low=0, high=1),
    "data.max_length": _Range(low=2),
    "data.tokens_per_microbatch": _Range(low=1),
    "data.workers": _Range(low=1),
    "parallel.tensor": _Range(low=1),
    "parallel.pipeline": _Range(low=1),
    "parallel.virtual_pipeline": _Range(low=2),
    "parallel.num_layers_in_first_pipeline_stage": _Range(low=1),
    "parallel.num_layers_in_last_pipeline_stage": _Range(low=1),
    "parallel.timeout_s": _Range(low=0, above=True),
    "parallel.bucket_size": _Range(low=1),
    "loss.beta": _Range(low=0, above=True),
    "loss.label_smoothing": _Range(low=0, high=0.5),
    "loss.discopop_tau": _Range(low=0, above=True),
    "loss.simpo_gamma": _Range(low=0),
    "loss.f_alpha_divergence_coef": _Range(low=0, high=1, above=True),
    "loss.ld_alpha": _Range(low=0, high=1),
    "reference.sync_every": _Range(low=1),
    "reference.sync_mix": _Range(low=0, high=1, above=True, to=True),
    "optimizer.lr": _Range(low=0),
    "optimizer.min_lr": _Range(low=0),
    "optimizer.warmup_steps": _Range(low=0),
    "optimizer.eps": _Range(low=0, above=True),
    "optimizer.weight_decay": _Range(low=0),
    "optimizer.clip_grad": _Range(low=0),
    "optimizer.offload_fraction": _Range(low=0, high=1, above=True, to=True),
    "precision.fp8_amax_history_len": _Range(low=1),
    "precision.num_layers_at_start_in_bf16": _Range(low=0),
    "precision.num_layers_at_end_in_bf16": _Range(low=0),
    "precision.fp8_check_every": _Range(low=1),
    "precision.fp8_check_pairs": _Range(low=1),
    "train.global_batch_size": _Range(low=1),
    "train.max_steps": _Range(low=1),
    "train.epochs": _Range(low=1),
    "train.seed": _Range(low=0, high=2**32),
    "train.log_every": _Range(low=1),
    "train.eval_every": _Range(low=1),
    "train.save_every": _Range(low=1),
    "train.max_hours": _Range(low=0, above=True),
    "train.max_bad_steps": _Range(low=1),
    "train.check_ranks_every": _Range(low=1),
    "checkpoint.keep_last": _Range(low=1),
    "checkpoint.keep_every": _Range(low=1),
    "cluster.gpus": _Range(low=1),
    "cluster.gpus_per_node": _Range(low=1),
    "cluster.memory_gib": _Range(low=0, above=True),
    "cluster.network_gb_per_s": _Range(low=0, above=True),
    "plan.prompt_tokens": _Range(low=1),
    "plan.response_tokens": _Range(low=1),
}


def validate(
    config: Config,
    *,
    world_size: int,
    shape: ModelShape | None = None,
    reference_shape: ModelShape | None = None,
    planning: bool = False,
) -> None:
    """Raises one ConfigError with all rules that `config` violates on `world_size` ranks; returns if there are none.

    Pass the configuration as the user wrote it, before `resolve_defaults`. With `shape`, the layout is also checked
    against the model's sizes, and with `reference_shape` against those of a separate reference. `planning` is for
    tools/plan.py: nothing is run, so that weights and data may be missing.
    """
    violations = [
        *_check_ranges(config),
        *_check_model(config, planning),
        *check_data(config, planning=planning),
        *_check_layout(config, world_size),
        *check_memory_keys(config),
        *(_check_shape(config, shape, "model", trained=True) if shape is not None else []),
        *(_check_shape(config, reference_shape, "reference", trained=False) if reference_shape is not None else []),
        *(_check_reference(config, shape, reference_shape) if shape and reference_shape else []),
        *check_fp8(config, num_layers=[model.num_layers for model in (shape, reference_shape) if model is not None]),
        *check_loss(config.loss),
        *check_reference_keys(config),
        *_check_optimizer(config),
        *_check_run(config),
        *check_checkpoints(config),
        *_check_device(config),
        *check_cluster(config, planning=planning),
        *_check_secrets(config),
    ]
    if violations:
        raise ConfigError(violations)


def check_run_dir_is_fresh(config: Config) -> None:
    """Raises ConfigError if a run would write to a directory with content that is not from its own start.

    For training only, on one rank, before it writes. Scoring or planning with the same configuration is allowed.
    """
    run_dir, resume = config.train.run_dir, config.train.resume
    if run_dir is None or not Path(run_dir).is_dir():
        return
    # Files of a start that was refused, or killed before its first step, which the next start can use.
    if {path.name for path in Path(run_dir).iterdir()} <= {"tokens", "reference", ".lock", ".config.yaml"}:
        return
    if resume == "auto":
        if not (Path(run_dir) / "config.yaml").is_file():
            raise ConfigError(
                f"train.run_dir={run_dir}: holds files but no config.yaml, so it is not the directory of a run: choose "
                "another directory"
            )
        return
    if resume == "never" or Path(run_dir).resolve() not in (Path(resume).resolve(), *Path(resume).resolve().parents):
        raise ConfigError(
            f"train.run_dir={run_dir}: must be empty with train.resume={resume}: continue its own run with "
            "train.resume=auto, or choose another directory"
        )


def _check_ranges(config: Config) -> list[str]:
    values = {key: attrgetter(key)(config) for key in _RANGES}
    violations = [
        f"{key}={show(value)}: must be {_RANGES[key]}"
        for key, value in values.items()
        if value is not None and value not in _RANGES[key]
    ]
    betas = config.optimizer.betas
    if any(beta not in _Range(low=0, high=1) for beta in betas):
        violations.append(f"optimizer.betas={show(betas)}: each must be in [0, 1), as in optimizer.betas=[0.9,0.999]")
    return violations


def _check_model(config: Config, planning: bool) -> list[str]:
    violations = []
    hf_path, checkpoint = config.model.hf_path, config.model.checkpoint
    if hf_path is None and checkpoint is None and config.model.name:  # a missing name must be corrected first
        violations += _check_missing_model(config, planning)
    if checkpoint is not None and hf_path is not None:
        violations.append(
            f"model.checkpoint={checkpoint}: must be the only source of weights, model.hf_path={hf_path} is another: "
            "drop one of the two (model.hf_path=null where the chosen model sets it)"
        )
    if checkpoint is not None and not Path(checkpoint).is_dir():
        violations.append(
            f"model.checkpoint={checkpoint}: must be the directory of a checkpoint or a run: check the path, or make "
            "one with tools/convert.py import"
        )
    for key, path in (("model.hf_path", config.model.hf_path), ("reference.hf_path", config.reference.hf_path)):
        if path is not None and not (Path(path) / "config.json").is_file():
            remedy = demo_remedy(path) or "download the model to a local directory and give its path"
            violations.append(f"{key}={path}: must be a Hugging Face directory with a config.json: {remedy}")
    return violations


def _check_missing_model(config: Config, planning: bool) -> list[str]:
    """Violation by a missing model directory, if weights, the tokenizer, or the shape are needed from it."""
    if planning and not config.data.train_path:
        if config.model.shape is not None:
            return []
        return ["model.hf_path=null: the model's shape is needed: give model.hf_path=DIR, or a named +model=NAME"]
    named = f"{config.model.name} is known by its shape, and " if config.model.shape is not None else ""
    if planning or config.train.dry_run:
        return [
            f"model.hf_path=null: {named}the data are read with its tokenizer: give model.hf_path=DIR, a directory "
            "with config.json and the tokenizer's files (weights are not read), or use tools/plan.py without data"
        ]
    return [
        f"model.hf_path=null: {named}weights must come from somewhere: give model.hf_path=DIR or model.checkpoint=DIR"
    ]


def _check_layout(config: Config, world_size: int) -> list[str]:
    parallel = config.parallel
    violations = []
    model_ranks = parallel.tensor * parallel.pipeline
    if parallel.tensor >= 1 and parallel.pipeline >= 1 and world_size % model_ranks:
        violations.append(
            f"parallel.tensor={parallel.tensor}, parallel.pipeline={parallel.pipeline}: their product {model_ranks} "
            f"must divide the world size {world_size}: start torchrun with a multiple of {model_ranks}"
        )
    if parallel.virtual_pipeline is not None and parallel.pipeline < 2:
        violations.append(
            f"parallel.virtual_pipeline={parallel.virtual_pipeline}: needs parallel.pipeline >= 2, it is "
            f"{parallel.pipeline}: raise it or drop virtual_pipeline"
        )
    if parallel.sequence_parallel and parallel.tensor < 2:
        violations.append(
            f"parallel.sequence_parallel=true: needs parallel.tensor >= 2, it is {parallel.tensor}: raise it or drop "
            "sequence_parallel"
        )
    return violations


def _check_reference(config: Config, shape: ModelShape, reference: ModelShape) -> list[str]:
    if reference.vocab_size == shape.vocab_size:
        return []
    return [
        f"reference.hf_path={config.reference.hf_path}: its vocabulary has {reference.vocab_size} entries, the "
        f"policy's {shape.vocab_size}: the reference must share the policy's tokenizer: give one that does"
    ]


def _check_shape(config: Config, shape: ModelShape, what: str, *, trained: bool) -> list[str]:
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    chunks = config.parallel.virtual_pipeline or 1
    if min(tensor, pipeline, chunks) < 1:
        return []  # out of range, which is reported elsewhere
    violations = []
    for part, size in (("attention heads", shape.num_attention_heads), ("MLP channels", shape.ffn_hidden_size)):
        if size % tensor:
            remedy = _use_divisor(size, tensor)
            violations.append(f"parallel.tensor={tensor}: must divide the {what}'s {size} {part}: {remedy}")
    groups = shape.num_query_groups
    if groups % tensor and tensor % groups:
        violations.append(
            f"parallel.tensor={tensor}: must divide the {what}'s {groups} key-value heads or be a multiple of them: "
            f"{_use_divisor(groups, tensor)}"
        )
    return [*violations, *check_pipeline_split(config, shape.num_layers, what, trained=trained)]


def _use_divisor(size: int, wanted: int) -> str:
    divisor = max(d for d in range(1, min(size, wanted) + 1) if size % d == 0)
    return f"use parallel.tensor={divisor} or another divisor"


def _check_optimizer(config: Config) -> list[str]:
    optimizer, max_steps = config.optimizer, config.train.max_steps
    violations = []
    if optimizer.schedule == Schedule.constant and optimizer.min_lr:
        violations.append(
            f"optimizer.min_lr={show(optimizer.min_lr)}: has no effect with optimizer.schedule=constant: "
            "leave it at 0, or use linear or cosine"
        )
    elif optimizer.min_lr > optimizer.lr:
        violations.append(
            f"optimizer.min_lr={show(optimizer.min_lr)}: must be at most optimizer.lr={show(optimizer.lr)}: "
            "lower it, or raise lr"
        )
    if max_steps is not None and 1 <= max_steps <= optimizer.warmup_steps:
        violations.append(
            f"optimizer.warmup_steps={optimizer.warmup_steps}: must be below train.max_steps={max_steps}: "
            "shorten the warm-up or train longer"
        )
    return violations


def _check_run(config: Config) -> list[str]:
    train, data = config.train, config.data
    violations = []
    if train.eval_every is not None and data.validation_path is None and not data.validation_fraction:
        violations.append(
            f"train.eval_every={train.eval_every}: has no effect without a validation set: give data.validation_path "
            "or data.validation_fraction, or drop eval_every"
        )
    if train.save_every is not None and train.log_every >= 1 and train.save_every % train.log_every:
        violations.append(
            f"train.save_every={train.save_every}: must be a multiple of train.log_every={train.log_every}: a line of "
            "metrics that spans a checkpoint could not be continued from it"
        )
    if train.run_dir is not None and Path(train.run_dir).exists() and not Path(train.run_dir).is_dir():
        violations.append(f"train.run_dir={train.run_dir}: must be a directory, it is a file: choose another path")
    if train.resume == "auto" and train.run_dir is None:
        violations.append(
            "train.resume=auto: needs train.run_dir: a directory named by the clock is always new: "
            "give train.run_dir=DIR"
        )
    if train.resume == "never" and train.resume_changes:
        violations.append(
            f"train.resume_changes={show(train.resume_changes)}: has no effect with train.resume=never: drop it, or "
            "continue a run"
        )
    if train.resume not in ("auto", "never") and not Path(train.resume).is_dir():
        violations.append(
            f"train.resume={train.resume}: must be auto, never or an existing checkpoint directory: check the path"
        )
    if TrackerName.jsonl not in config.trackers:
        violations.append(
            f"trackers={show(config.trackers)}: must include jsonl, which reports and resuming read: "
            f"trackers={show([TrackerName.jsonl, *config.trackers])}"
        )
    if len(set(config.trackers)) < len(config.trackers):
        violations.append(f"trackers={show(config.trackers)}: must name each tracker once: drop the repetition")
    return violations


def _check_device(config: Config) -> list[str]:
    kernel, backend = config.device.attention, config.precision.backend
    on_gpus: list[tuple[str, str]] = []
    if kernel in (AttentionKernel.varlen, AttentionKernel.transformer_engine):
        on_gpus.append((f"device.attention={kernel}", "device.attention=auto or sdpa"))
    if backend == Backend.transformer_engine:
        on_gpus.append((f"precision.backend={backend}", "precision.backend=auto or native"))
    violations = []
    for setting, remedy in on_gpus:
        if config.device.kind == DeviceKind.cpu:
            violations.append(f"{setting}: needs CUDA, it is device.kind=cpu: use {remedy}")
        if config.precision.dtype == Dtype.fp32:
            violations.append(f"{setting}: needs precision.dtype=bf16, it is fp32: use {remedy}")
    return violations


def _check_secrets(config: Config) -> list[str]:
    copied = "since the configuration is copied into the run directory and the model card"
    violations = []
    for key, text in _texts(config, ""):
        if variables := secret_variables(text):
            violations.append(
                f"{key}={text}: must not hold what {variables[0]} of the environment holds, {copied}: drop it, what "
                f"needs it reads the variable; if it is no secret, start with another name than {variables[0]} for it"
            )
        elif redact(text) != text:
            violations.append(
                f"{key}={text}: must not hold the credentials of a URL, nor others, {copied}: leave them to ~/.netrc "
                "or HF_TOKEN, or give a local path"
            )
    return violations


def _texts(value: object, key: str) -> Iterator[tuple[str, str]]:
    """Yields (dotted key, text) of all texts in a configuration."""
    if is_dataclass(value):
        for item in fields(value):
            yield from _texts(attrgetter(item.name)(value), f"{key}.{item.name}".lstrip("."))
    elif isinstance(value, str):
        yield key, value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item, key)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _texts(item, f"{key}.{name}")
