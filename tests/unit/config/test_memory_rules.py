"""Keys that trade memory, time and rounding: what is refused, what a null stands for, what is said of a lone rank."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.optimizer import distrib_optimizer

from megadpo.config.compose import config_from_yaml, resolve_defaults
from megadpo.config.schema import Config
from megadpo.config.validation import ModelShape, validate
from megadpo.errors import ConfigError
from megadpo.optimizer.build import DataParallelOptions, OptimizerOptions
from megadpo.runtime.device import Device
from megadpo.setup.options import data_parallel_options, optimizer_options, optimizer_problems
from tests.helpers.stand_ins.fused_adam import FusedAdam

SHAPE = ModelShape(num_layers=8, num_attention_heads=8, num_query_groups=2, ffn_hidden_size=64, vocab_size=401)
CUDA, CPU = Device("cuda", torch.device("cuda", 0)), Device("cpu", torch.device("cpu"))


@pytest.fixture
def build(tmp_path: Path) -> Any:
    """Makes a configuration of `key=value` words whose files exist."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pairs.jsonl").write_text("{}\n")

    def call(*words: str) -> Config:
        groups: dict[str, dict[str, str]] = {
            "model": {"name": "hf", "hf_path": str(tmp_path)},
            "data": {"train_path": str(tmp_path / "pairs.jsonl")},
        }
        for word in words:
            key, _, value = word.partition("=")
            group, _, name = key.partition(".")
            groups.setdefault(group, {})[name] = value
        lines = [f"{group}:\n" + "".join(f"  {k}: {v}\n" for k, v in keys.items()) for group, keys in groups.items()]
        return config_from_yaml("".join(lines))

    return call


def world(config: Config) -> int:
    return 2 * config.parallel.tensor * config.parallel.pipeline


@pytest.mark.parametrize(
    "words",
    [
        "model.recompute_granularity=selective",
        "model.recompute_granularity=selective model.recompute_modules=[core_attn,mlp]",
        "model.recompute_granularity=full",
        "model.recompute_granularity=full model.recompute_num_layers=4 parallel.pipeline=2",
        "model.recompute_granularity=full model.recompute_method=block model.recompute_num_layers=3",
        "parallel.pipeline=3 parallel.num_layers_in_first_pipeline_stage=2",
        "parallel.pipeline=3 parallel.num_layers_in_last_pipeline_stage=2",
        "parallel.pipeline=4 parallel.num_layers_in_first_pipeline_stage=1 "
        "parallel.num_layers_in_last_pipeline_stage=3",
        "parallel.pipeline=2 parallel.virtual_pipeline=2 parallel.num_layers_in_first_pipeline_stage=2",
        "parallel.overlap_grad_reduce=true parallel.bucket_size=1000",
        "parallel.overlap_grad_reduce=true parallel.overlap_param_gather=true",
        "parallel.grad_reduce_in_fp32=false",
        "optimizer.precision_aware=true optimizer.exp_avg_dtype=bf16 optimizer.exp_avg_sq_dtype=fp16",
        "optimizer.precision_aware=true optimizer.exp_avg_sq_dtype=bf16 optimizer.betas=[0.9,0.95]",
        "optimizer.precision_aware=true optimizer.exp_avg_dtype=fp8",
        "optimizer.cpu_offload=true optimizer.offload_fraction=0.3 optimizer.overlap_cpu_optimizer_d2h_h2d=true",
    ],
)
def test_sensible_settings_pass(words: str, build: Any) -> None:
    config = build(*words.split())
    validate(config, world_size=world(config), shape=SHAPE)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "model.recompute_method=block",
            "model.recompute_method=block: has no effect with model.recompute_granularity=null: drop it, or use model",
        ),
        (
            "model.recompute_granularity=selective model.recompute_num_layers=2",
            "model.recompute_num_layers=2: has no effect with model.recompute_granularity=selective: drop it, or use ",
        ),
        (
            "model.recompute_granularity=full model.recompute_modules=[mlp]",
            "model.recompute_modules=[mlp]: has no effect with model.recompute_granularity=full: drop it, or use mode",
        ),
        (
            "model.recompute_granularity=selective model.recompute_modules=[]",
            "model.recompute_modules=[]: must name at least one part",
        ),
        (
            "model.recompute_granularity=selective model.recompute_modules=[mlp,mlp]",
            "model.recompute_modules=[mlp, mlp]: must name at least one part, and each once",
        ),
        (
            "model.recompute_granularity=full model.recompute_num_layers=3",
            "model.recompute_num_layers=3: must divide the 8 layers of the model's chunks with model.recompute_method",
        ),
        (
            "model.recompute_granularity=full model.recompute_num_layers=4 parallel.pipeline=2 "
            "parallel.virtual_pipeline=2 parallel.num_layers_in_first_pipeline_stage=2",
            "model.recompute_num_layers=4: must divide the 1 and 3 layers of the model's chunks",
        ),
        (
            "model.recompute_granularity=full model.recompute_method=block model.recompute_num_layers=5 "
            "parallel.pipeline=2",
            "model.recompute_num_layers=5: a chunk of the model has 4 layers, so it must be at most 4",
        ),
        (
            "parallel.num_layers_in_first_pipeline_stage=2",
            "parallel.num_layers_in_first_pipeline_stage=2: needs parallel.pipeline >= 2, it is 1: raise it or drop",
        ),
        (
            "parallel.pipeline=2 parallel.num_layers_in_first_pipeline_stage=3 "
            "parallel.num_layers_in_last_pipeline_stage=5",
            "parallel.num_layers_in_first_pipeline_stage=3, parallel.num_layers_in_last_pipeline_stage=5: with "
            "parallel.pipeline=2 one of them says what the other must be: drop one",
        ),
        (
            "parallel.pipeline=3 parallel.num_layers_in_first_pipeline_stage=3",
            "parallel.num_layers_in_first_pipeline_stage=3, parallel.pipeline=3: 5 of the model's 8 layers are left "
            "for 2 other stages, which must be a multiple of 2, and not 0: choose other numbers",
        ),
        (
            "parallel.pipeline=2 parallel.num_layers_in_last_pipeline_stage=8",
            "parallel.num_layers_in_last_pipeline_stage=8, parallel.pipeline=2: 0 of the model's 8 layers are left fo",
        ),
        (
            "parallel.pipeline=2 parallel.virtual_pipeline=3 parallel.num_layers_in_first_pipeline_stage=2",
            "parallel.num_layers_in_first_pipeline_stage=2: a stage of 2 layers cannot be cut into parallel.virtual_p",
        ),
        (
            "parallel.overlap_param_gather=true",
            "parallel.overlap_param_gather=true: needs parallel.overlap_grad_reduce=true: set it, or drop both",
        ),
        ("parallel.bucket_size=9", "parallel.bucket_size=9: has no effect without parallel.overlap_grad_reduce=true"),
        (
            "parallel.grad_reduce_in_fp32=false precision.dtype=fp32",
            "parallel.grad_reduce_in_fp32=false: has no effect with precision.dtype=fp32, whose gradients are fp32",
        ),
        (
            "optimizer.exp_avg_dtype=bf16",
            "optimizer.exp_avg_dtype=bf16: has no effect without optimizer.precision_aware=true: set it, or drop",
        ),
        (
            "optimizer.precision_aware=true optimizer.exp_avg_sq_dtype=bf16",
            "optimizer.exp_avg_sq_dtype=bf16: an update with beta=0.999 changes the mean by a share of 0.001, which "
            "bf16 rounds away below 0.0039: the mean would stand still",
        ),
        (
            "optimizer.precision_aware=true optimizer.exp_avg_sq_dtype=fp8 optimizer.betas=[0.9,0.95]",
            "optimizer.exp_avg_sq_dtype=fp8: an update with beta=0.95 changes the mean by a share of 0.05, which fp8",
        ),
        (
            "optimizer.precision_aware=true optimizer.cpu_offload=true",
            "optimizer.precision_aware=true, optimizer.cpu_offload=true: the host keeps main weights and moments in f",
        ),
        (
            "optimizer.precision_aware=true device.kind=cpu",
            "optimizer.precision_aware=true: needs CUDA, it is device.kind=cpu: drop it",
        ),
        (
            "optimizer.cpu_offload=true device.kind=cpu",
            "optimizer.cpu_offload=true: needs CUDA, it is device.kind=cpu: drop it",
        ),
        (
            "optimizer.cpu_offload=true precision.dtype=fp32",
            "optimizer.cpu_offload=true: needs precision.dtype=bf16, it is fp32",
        ),
        ("optimizer.offload_fraction=0.5", "optimizer.offload_fraction=0.5: has no effect without optimizer.cpu_off"),
        (
            "optimizer.overlap_cpu_optimizer_d2h_h2d=true",
            "optimizer.overlap_cpu_optimizer_d2h_h2d=true: has no effect without optimizer.cpu_offload=true",
        ),
    ],
)
def test_a_broken_rule_is_named(words: str, message: str, build: Any) -> None:
    config = build(*words.split())
    with pytest.raises(ConfigError) as caught:
        validate(config, world_size=world(config), shape=SHAPE)
    assert any(line.startswith(message) for line in caught.value.violations), caught.value.violations


def test_all_broken_rules_come_at_once(build: Any) -> None:
    words = ("model.recompute_method=block", "parallel.bucket_size=9", "optimizer.offload_fraction=0.5")
    with pytest.raises(ConfigError) as caught:
        validate(build(*words), world_size=1, shape=SHAPE)
    assert [line.partition("=")[0] for line in caught.value.violations] == [word.partition("=")[0] for word in words]


@pytest.mark.parametrize(
    ("granularity", "resolved"),
    [("null", (None, None, None)), ("full", ("uniform", 1, None)), ("selective", (None, None, ["core_attn"]))],
)
def test_what_a_null_of_recomputation_stands_for(granularity: str, resolved: tuple[Any, ...], build: Any) -> None:
    model = resolve_defaults(build(f"model.recompute_granularity={granularity}"), datetime(2031, 1, 1)).model
    assert (model.recompute_method, model.recompute_num_layers, model.recompute_modules) == resolved


def test_a_lone_data_parallel_rank_is_told_that_it_overlaps_nothing(
    build: Any, caplog: pytest.LogCaptureFixture
) -> None:
    config = build("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true", "parallel.bucket_size=9")
    two: Any = SimpleNamespace(data_size=2)
    options = data_parallel_options(config, two)
    assert options == DataParallelOptions(overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=9)
    assert not caplog.records
    one: Any = SimpleNamespace(data_size=1)
    assert data_parallel_options(config, one) == DataParallelOptions()
    (record,) = caplog.records
    assert "overlap_grad_reduce=true has no effect: one data-parallel rank exchanges nothing" in record.getMessage()


def test_the_optimizer_gets_its_formats_and_its_place(build: Any) -> None:
    words = ("optimizer.precision_aware=true", "optimizer.exp_avg_dtype=bf16", "optimizer.exp_avg_sq_dtype=fp8")
    assert optimizer_options(build(*words)) == OptimizerOptions(
        precision_aware=True, exp_avg_dtype=torch.bfloat16, exp_avg_sq_dtype=torch.uint8
    )
    words = ("optimizer.cpu_offload=true", "optimizer.offload_fraction=0.3")
    assert optimizer_options(build(*words)) == OptimizerOptions(offload_fraction=0.3)
    assert optimizer_options(build()) == OptimizerOptions()


class _OldAdam(FusedAdam):
    def __init__(self, params: Any, exp_avg_dtype: torch.dtype = torch.float32) -> None: ...


@pytest.mark.parametrize("key", ["precision_aware", "cpu_offload"])
@pytest.mark.parametrize(
    ("device", "adam", "lacks"),
    [
        (CPU, FusedAdam, "CUDA"),
        (CUDA, None, "Transformer Engine, for its FusedAdam (NGC's PyTorch images hold it)"),
        (
            CUDA,
            _OldAdam,
            "a newer Transformer Engine: its FusedAdam does not know master_weight_dtype, exp_avg_sq_dtype, "
            "use_decoupled_grad",
        ),
        (CUDA, FusedAdam, None),
    ],
)
def test_what_the_optimizer_lacks_is_said(
    key: str, device: Device, adam: Any, lacks: str | None, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", adam is not None)
    monkeypatch.setattr(distrib_optimizer, "Adam", adam)
    assert optimizer_problems(build(), device) == []
    if adam is _OldAdam and key == "cpu_offload":
        lacks = None  # the host's moments have no formats
    said = [] if lacks is None else [f"optimizer.{key}=true: needs {lacks}: drop it"]
    assert optimizer_problems(build(f"optimizer.{key}=true"), device) == said
