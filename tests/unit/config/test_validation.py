"""Every key is accepted, refused and reported by name; mistakes are reported together; YAML gives back what it got."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from operator import attrgetter
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from megadpo.commands.command_line import check
from megadpo.config import validation
from megadpo.config.choices import Dtype, LossName
from megadpo.config.compose import compose_config, config_from_yaml, config_to_yaml, resolve_defaults
from megadpo.config.schema import Config
from megadpo.config.typed import config_to_dict, known_keys
from megadpo.config.validation import ModelShape, check_run_dir_is_fresh, validate
from megadpo.errors import ConfigError

CONF = Path(__file__).parents[3] / "conf"
MODELS = "demo, hf, llama3_8b, llama70b, qwen2_5_7b, qwen3_8b"
SHAPE = ModelShape(num_layers=8, num_attention_heads=8, num_query_groups=2, ffn_hidden_size=64, vocab_size=401)

# key -> (override, value it gives, a value that is refused, what the refusal says)
KEYS = {
    "model.name": ("tiny", "tiny", "7", "must be text"),
    "model.hf_path": ("some/dir", "some/dir", "true", "must be text or null"),
    "model.checkpoint": ("some/dir", "some/dir", "3", "must be text or null"),
    "model.shape": (
        "{architectures: [LlamaForCausalLM], hidden_size: 64}",
        {"architectures": ["LlamaForCausalLM"], "hidden_size": 64},
        "7",
        "must be a mapping of names to values or null",
    ),
    "model.logits_mib": ("64", 64, "0", "must be a finite number >= 1"),
    "model.recompute_granularity": ("full", "full", "some", "must be one of selective, full or null"),
    "model.recompute_method": ("block", "block", "every", "must be one of uniform, block or null"),
    "model.recompute_num_layers": ("2", 2, "0", "must be a finite number >= 1"),
    "model.recompute_modules": ("mlp", ["mlp"], "[layernorm]", "must be one of core_attn, mlp, or a list of that"),
    "data.train_path": ("[a.jsonl,b.jsonl]", ["a.jsonl", "b.jsonl"], "3", "must be text, or a list of that"),
    "data.validation_path": ("{easy: e.jsonl}", {"easy": "e.jsonl"}, "[x]", "must be text or a mapping of names"),
    "data.validation_fraction": ("0.25", 0.25, "1", "must be in [0, 1)"),
    "data.prompt_key": ("question", "question", "''", "must be text, as in data.prompt_key=prompt"),
    "data.chosen_key": ("good", "good", "null", "must be text, as in data.chosen_key=chosen"),
    "data.rejected_key": ("bad", "bad", "[a]", "must be text, as in data.rejected_key=rejected"),
    "data.max_length": ("64", 64, "1", "must be a finite number >= 2"),
    "data.truncation": ("keep_end", "keep_end", "keep", "must be one of keep_start, keep_end, drop, error"),
    "data.on_error": ("skip", "skip", "ignore", "must be one of error, skip"),
    "data.template_date": ("2025-01-31", "2025-01-31", "31.1.2025", "must be a day, as in data.template_date="),
    "data.cache_dir": ("some/dir", "some/dir", "3", "must be text or null"),
    "data.workers": ("4", 4, "0", "must be a finite number >= 1"),
    "data.share_prompt": ("false", False, "1", "must be true or false"),
    "data.tokens_per_microbatch": ("512", 512, "0", "must be a finite number >= 1"),
    "parallel.tensor": ("2", 2, "0", "must be a finite number >= 1"),
    "parallel.pipeline": ("2", 2, "two", "must be a whole number"),
    "parallel.virtual_pipeline": ("2", 2, "1", "must be a finite number >= 2"),
    "parallel.sequence_parallel": ("false", False, "1", "must be true or false or null"),
    "parallel.num_layers_in_first_pipeline_stage": ("3", 3, "0", "must be a finite number >= 1"),
    "parallel.num_layers_in_last_pipeline_stage": ("3", 3, "-1", "must be a finite number >= 1"),
    "parallel.overlap_grad_reduce": ("true", True, "1", "must be true or false"),
    "parallel.overlap_param_gather": ("true", True, "1", "must be true or false"),
    "parallel.bucket_size": ("1000", 1000, "0", "must be a finite number >= 1"),
    "parallel.grad_reduce_in_fp32": ("false", False, "1", "must be true or false"),
    "parallel.timeout_s": ("60", 60.0, "0", "must be a finite number > 0"),
    "loss.name": ("[ipo,sft]", ["ipo", "sft"], "dpo", "must be one of sigmoid, robust, ipo, hinge, sigmoid_norm, "),
    "loss.weights": ("[1,0.5]", [1.0, 0.5], "[1,heavy]", "must be a number, or a list of that or null"),
    "loss.beta": ("0.3", 0.3, "0", "must be a finite number > 0"),
    "loss.label_smoothing": ("0.1", 0.1, "0.5", "must be in [0, 0.5)"),
    "loss.ipo_length_normalize": ("false", False, "'false'", "must be true or false"),
    "loss.discopop_tau": ("0.1", 0.1, "0", "must be a finite number > 0"),
    "loss.simpo_gamma": ("1.2", 1.2, "-1", "must be a finite number >= 0"),
    "loss.f_divergence": ("js", "js", "kl", "must be one of reverse_kl, forward_kl, js, alpha"),
    "loss.f_alpha_divergence_coef": ("0.7", 0.7, "1", "must be in (0, 1)"),
    "loss.ld_alpha": ("0.5", 0.5, "1", "must be in [0, 1)"),
    "reference.mode": ("offload", "offload", "disk", "must be one of resident, offload, cached, none"),
    "reference.hf_path": ("some/dir", "some/dir", "3", "must be text or null"),
    "reference.cache_dir": ("some/dir", "some/dir", "3", "must be text or null"),
    "reference.sync_every": ("16", 16, "0", "must be a finite number >= 1"),
    "reference.sync_mix": ("0.9", 0.9, "0", "must be in (0, 1]"),
    "precision.dtype": ("fp32", "fp32", "fp16", "must be one of bf16, fp32"),
    "precision.backend": ("native", "native", "te", "must be one of auto, native, transformer_engine"),
    "precision.fp8": ("mxfp8", "mxfp8", "int8", "must be one of tensorwise, delayed, blockwise, mxfp8 or null"),
    "precision.fp8_backend": ("emulate", "emulate", "cpu", "must be one of transformer_engine, emulate"),
    "precision.fp8_format": ("e4m3", "e4m3", "e5m2", "must be one of hybrid, e4m3 or null"),
    "precision.fp8_amax_history_len": ("16", 16, "0", "must be a finite number >= 1"),
    "precision.fp8_amax_compute_algo": ("max", "max", "mean", "must be one of most_recent, max"),
    "precision.num_layers_at_start_in_bf16": ("1", 1, "-1", "must be a finite number >= 0"),
    "precision.num_layers_at_end_in_bf16": ("1", 1, "-1", "must be a finite number >= 0"),
    "precision.fp8_check_every": ("10", 10, "0", "must be a finite number >= 1"),
    "precision.fp8_check_pairs": ("4", 4, "0", "must be a finite number >= 1"),
    "optimizer.lr": ("1e-3", 1e-3, "-1", "must be a finite number >= 0"),
    "optimizer.min_lr": ("1e-9", 1e-9, "nan", "must be a finite number >= 0"),
    "optimizer.schedule": ("cosine", "cosine", "step", "must be one of constant, linear, cosine"),
    "optimizer.warmup_steps": ("5", 5, "-1", "must be a finite number >= 0"),
    "optimizer.betas": ("[0.8,0]", (0.8, 0.0), "[0.9]", "must be a list of 2, each a number"),
    "optimizer.eps": ("1", 1.0, "0", "must be a finite number > 0"),
    "optimizer.weight_decay": ("0.1", 0.1, "inf", "must be a finite number >= 0"),
    "optimizer.clip_grad": ("0", 0.0, "-0.5", "must be a finite number >= 0"),
    "optimizer.precision_aware": ("true", True, "1", "must be true or false"),
    "optimizer.exp_avg_dtype": ("bf16", "bf16", "int8", "must be one of fp32, bf16, fp16, fp8"),
    "optimizer.exp_avg_sq_dtype": ("fp16", "fp16", "int8", "must be one of fp32, bf16, fp16, fp8"),
    "optimizer.cpu_offload": ("true", True, "1", "must be true or false"),
    "optimizer.offload_fraction": ("0.5", 0.5, "0", "must be in (0, 1]"),
    "optimizer.overlap_cpu_optimizer_d2h_h2d": ("true", True, "1", "must be true or false"),
    "train.global_batch_size": ("8", 8, "8.5", "must be a whole number"),
    "train.max_steps": ("3", 3, "0", "must be a finite number >= 1"),
    "train.epochs": ("2", 2, "0", "must be a finite number >= 1"),
    "train.seed": ("11", 11, "-1", "must be in [0, 4294967296)"),
    "train.shuffle": ("false", False, "no-thanks", "must be true or false"),
    "train.log_every": ("10", 10, "0", "must be a finite number >= 1"),
    "train.log_token_statistics": ("true", True, "1", "must be true or false"),
    "train.eval_every": ("10", 10, "0", "must be a finite number >= 1"),
    "train.save_every": ("10", 10, "true", "must be a whole number or null"),
    "train.max_bad_steps": ("5", 5, "0", "must be a finite number >= 1"),
    "train.check_ranks_every": ("10", 10, "0", "must be a finite number >= 1"),
    "train.max_hours": ("0.5", 0.5, "0", "must be a finite number > 0"),
    "train.run_dir": ("out/run", "out/run", "5", "must be text or null"),
    "train.dry_run": ("true", True, "1", "must be true or false"),
    "train.resume": ("auto", "auto", "null", "must be text, as in train.resume=never"),
    "train.resume_changes": (
        "[data,loss]",
        ["data", "loss"],
        "order",
        "must be one of data, batch_size, loss, reference",
    ),
    "checkpoint.keep_last": ("1", 1, "0", "must be a finite number >= 1"),
    "checkpoint.keep_every": ("20", 20, "0", "must be a finite number >= 1"),
    "checkpoint.keep_best": ("eval/loss", "eval/loss", "5", "must be text or null"),
    "checkpoint.async_save": ("false", False, "0", "must be true or false"),
    "trackers": ("[jsonl,wandb]", ["jsonl", "wandb"], "mlflow", "must be one of jsonl, tensorboard, wandb"),
    "device.kind": ("cpu", "cpu", "tpu", "must be one of auto, cuda, cpu"),
    "device.attention": ("sdpa", "sdpa", "flash", "must be one of auto, sdpa, varlen, transformer_engine"),
    "cluster.gpus": ("64", 64, "0", "must be a finite number >= 1"),
    "cluster.gpu": ("h100", "h100", "7", "must be text or null"),
    "cluster.gpus_per_node": ("4", 4, "0", "must be a finite number >= 1"),
    "cluster.memory_gib": ("40", 40.0, "0", "must be a finite number > 0"),
    "cluster.network_gb_per_s": ("25", 25.0, "-1", "must be a finite number > 0"),
    "plan.prompt_tokens": ("300", 300, "0", "must be a finite number >= 1"),
    "plan.response_tokens": ("200", 200, "0", "must be a finite number >= 1"),
}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """A model directory and data files that exist, as overrides."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    for name in ("train.jsonl", "valid.jsonl"):
        (tmp_path / name).write_text("{}\n")
    return {"model.hf_path": str(model), "data.train_path": str(tmp_path / "train.jsonl")}


def build(files: dict[str, str], *overrides: str) -> Config:
    """A configuration of single keys, without the time that Hydra takes to read conf/."""
    words = ["model.name=hf", *(f"{key}={value}" for key, value in files.items()), *overrides]
    return config_from_yaml(OmegaConf.to_yaml(OmegaConf.from_dotlist(words)))


def violations(files: dict[str, str], *overrides: str, world_size: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validate(build(files, *overrides), world_size=world_size, shape=SHAPE)
    return caught.value.violations


def compose_violations(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose_config(overrides)
    return caught.value.violations


# Each key


def test_every_key_is_in_the_table() -> None:
    assert list(KEYS) == list(known_keys())


@pytest.fixture(scope="module")
def all_keys_set() -> Config:
    """One configuration in which every key has its value of the table."""
    return compose_config([f"{key}={text}" for key, (text, _, _, _) in KEYS.items()])


@pytest.fixture(scope="module")
def all_keys_wrong() -> list[str]:
    """What is said about the refused values of the table: first those of a wrong type, then those out of range."""
    with pytest.raises(ConfigError) as of_types:
        compose_config([f"{key}={text}" for key, (_, _, text, _) in KEYS.items()])
    wrong_type = {line.partition("=")[0] for line in of_types.value.violations}
    right = [f"{key}={text}" for key, (text, _, _, _) in KEYS.items() if key in wrong_type]
    wrong = [f"{key}={text}" for key, (_, _, text, _) in KEYS.items() if key not in wrong_type]
    with pytest.raises(ConfigError) as of_ranges:
        validate(compose_config([*right, *wrong]), world_size=1)
    return [*of_types.value.violations, *of_ranges.value.violations]


@pytest.mark.parametrize("key", KEYS)
def test_key_takes_a_value(key: str, all_keys_set: Config) -> None:
    assert attrgetter(key)(all_keys_set) == KEYS[key][1]


@pytest.mark.parametrize("key", KEYS)
def test_key_refuses_a_value_and_says_what_is_wanted(key: str, all_keys_wrong: list[str]) -> None:
    requirement = KEYS[key][3]
    assert [line for line in all_keys_wrong if line.startswith(f"{key}=") and f": {requirement}" in line]


def test_every_key_survives_the_round_trip(all_keys_set: Config) -> None:
    assert config_from_yaml(config_to_yaml(all_keys_set)) == all_keys_set


def test_every_number_has_a_range() -> None:
    config = compose_config(["+model=demo", "data.train_path=x", "train.max_steps=1", "train.save_every=1"])
    defaults = {key: attrgetter(key)(config) for key in known_keys()}
    numbers = {key for key, value in defaults.items() if type(value) in (int, float)}
    nullable = {
        "model.recompute_num_layers",
        "parallel.virtual_pipeline",
        "parallel.num_layers_in_first_pipeline_stage",
        "parallel.num_layers_in_last_pipeline_stage",
        "parallel.bucket_size",
        "loss.ld_alpha",
        "reference.sync_every",
        "precision.fp8_check_every",
        "train.eval_every",
        "train.max_hours",
        "checkpoint.keep_every",
        "data.workers",
        "cluster.gpus",
        "cluster.gpus_per_node",
        "cluster.memory_gib",
        "cluster.network_gb_per_s",
        "plan.prompt_tokens",
        "plan.response_tokens",
    }
    assert numbers | nullable == set(validation._RANGES)


def test_defaults_are_the_documented_ones(files: dict[str, str]) -> None:
    assert config_to_dict(build(files)) == {
        "model": {
            "name": "hf",
            "hf_path": files["model.hf_path"],
            "checkpoint": None,
            "shape": None,
            "logits_mib": 128,
            "recompute_granularity": None,
            "recompute_method": None,
            "recompute_num_layers": None,
            "recompute_modules": None,
        },
        "data": {
            "train_path": [files["data.train_path"]],
            "validation_path": None,
            "validation_fraction": 0.0,
            "prompt_key": "prompt",
            "chosen_key": "chosen",
            "rejected_key": "rejected",
            "max_length": 2048,
            "truncation": "keep_start",
            "on_error": "error",
            "template_date": None,
            "cache_dir": None,
            "workers": None,
            "share_prompt": True,
            "tokens_per_microbatch": 8192,
        },
        "parallel": {
            "tensor": 1,
            "pipeline": 1,
            "virtual_pipeline": None,
            "sequence_parallel": None,
            "num_layers_in_first_pipeline_stage": None,
            "num_layers_in_last_pipeline_stage": None,
            "overlap_grad_reduce": False,
            "overlap_param_gather": False,
            "bucket_size": None,
            "grad_reduce_in_fp32": True,
            "timeout_s": 1800.0,
        },
        "loss": {
            "name": ["sigmoid"],
            "weights": None,
            "beta": 0.1,
            "label_smoothing": 0.0,
            "ipo_length_normalize": True,
            "discopop_tau": 0.05,
            "simpo_gamma": 0.5,
            "f_divergence": "reverse_kl",
            "f_alpha_divergence_coef": 0.5,
            "ld_alpha": None,
        },
        "reference": {
            "mode": "resident",
            "hf_path": None,
            "cache_dir": None,
            "sync_every": None,
            "sync_mix": 0.6,
        },
        "precision": {
            "dtype": "bf16",
            "backend": "auto",
            "fp8": None,
            "fp8_backend": "transformer_engine",
            "fp8_format": None,
            "fp8_amax_history_len": 1,
            "fp8_amax_compute_algo": "most_recent",
            "num_layers_at_start_in_bf16": 0,
            "num_layers_at_end_in_bf16": 0,
            "fp8_check_every": None,
            "fp8_check_pairs": 8,
        },
        "optimizer": {
            "lr": 1e-6,
            "min_lr": 0.0,
            "schedule": "linear",
            "warmup_steps": 0,
            "betas": [0.9, 0.999],
            "eps": 1e-8,
            "weight_decay": 0.0,
            "clip_grad": 1.0,
            "precision_aware": False,
            "exp_avg_dtype": "fp32",
            "exp_avg_sq_dtype": "fp32",
            "cpu_offload": False,
            "offload_fraction": 1.0,
            "overlap_cpu_optimizer_d2h_h2d": False,
        },
        "train": {
            "global_batch_size": 64,
            "max_steps": None,
            "epochs": 1,
            "seed": 0,
            "shuffle": True,
            "log_every": 1,
            "log_token_statistics": False,
            "eval_every": None,
            "save_every": None,
            "max_bad_steps": 3,
            "check_ranks_every": 100,
            "max_hours": None,
            "run_dir": None,
            "dry_run": False,
            "resume": "never",
            "resume_changes": [],
        },
        "checkpoint": {"keep_last": 2, "keep_every": None, "keep_best": None, "async_save": True},
        "trackers": ["jsonl", "tensorboard"],
        "device": {"kind": "auto", "attention": "auto"},
        "cluster": {
            "gpus": None,
            "gpu": None,
            "gpus_per_node": None,
            "memory_gib": None,
            "network_gb_per_s": None,
        },
        "plan": {"prompt_tokens": None, "response_tokens": None},
    }


# Composition


@pytest.mark.parametrize("path", sorted(CONF.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_group_file_composes(path: Path) -> None:
    model = [] if path.parent.name == "model" else ["+model=demo"]
    values = ["model.hf_path=DIR", "data.train_path=pairs.jsonl"]
    chosen = compose_config([*model, f"+{path.parent.name}={path.stem}", *values])
    assert chosen == compose_config([*model, f"{path.parent.name}={path.stem}", *values])
    plain = compose_config(["+model=hf", "model.name=other", *values])
    assert chosen != plain


def test_group_files_set_what_they_say() -> None:
    config = compose_config(["+experiment=demo", "+model=demo", "loss=ipo", "precision=fp32"])
    assert (config.parallel.tensor, config.parallel.pipeline) == (2, 2)
    assert config.model.hf_path == "outputs/demo/model"
    assert config.loss.name == [LossName.ipo]
    assert config.precision.dtype is Dtype.fp32


def test_a_key_on_the_command_line_wins_over_files_and_the_last_one_over_earlier_ones() -> None:
    config = compose_config(["train.max_steps=7", "+model=demo", "train.max_steps=8", "+experiment=demo"])
    assert config.train.max_steps == 8


def test_an_experiment_wins_over_other_groups_in_any_order(tmp_path: Path) -> None:
    for name, text in {
        "config.yaml": "defaults: [_self_]\n",
        "model/a.yaml": "name: a\n",
        "precision/fp32.yaml": "dtype: fp32\n",
        "experiment/e.yaml": "# @package _global_\nprecision: {dtype: bf16}\ndata: {train_path: x}\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    groups = ["+experiment=e", "+precision=fp32", "+model=a"]
    assert compose_config(groups, config_dir=tmp_path) == compose_config(groups[::-1], config_dir=tmp_path)
    assert compose_config(groups, config_dir=tmp_path).precision.dtype is Dtype.bf16


def test_interpolations_resolve_and_dead_ones_are_named() -> None:
    words = ["+model=demo", "data.train_path=x"]
    assert compose_config([*words, "train.run_dir=runs/${model.name}"]).train.run_dir == "runs/demo"
    assert compose_violations(*words, "train.run_dir=${nowhere}") == [
        "train.run_dir: Interpolation key 'nowhere' not found"
    ]


def test_no_model_lists_the_models() -> None:
    first, second = compose_violations()
    assert first.startswith(f"no model named: add +model=NAME, one of {MODELS} ")
    assert second == "data.train_path is required: add data.train_path=VALUE"


@pytest.mark.parametrize("word", ["+model=nosuch", "model=nosuch"])
def test_an_unknown_model_lists_the_models(word: str) -> None:
    assert compose_violations(word, "data.train_path=x") == [f"model=nosuch: no such model: one of {MODELS}"]


def test_hf_without_weights_says_where_they_may_come_from(files: dict[str, str]) -> None:
    (line,) = violations(files, "model.hf_path=null")
    assert line.endswith("weights must come from somewhere: give model.hf_path=DIR or model.checkpoint=DIR")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("~loss", "~loss: keys cannot be deleted"),
        ("loss.beta=0.1,0.2", "loss.beta=0.1,0.2: one run has one value"),
        ("loss.beta=range(1,3)", "loss.beta=range(1,3): one run has one value"),
        ("--multirun", "--multirun: options are not known here"),
        ("-m", "-m: options are not known here"),
        ("beta", "beta: must be key=value or +group=file"),
        ("loss@other=ipo", "loss@other=ipo: groups have no packages"),
        ("loss/more=ipo", "loss/more=ipo: groups have no packages or subgroups"),
        ("+model=hf", "model=hf: model=demo is given too: choose one of them"),
        ("loss=ip", "loss=ip: no such loss: did you mean loss=ipo?"),
        ("device=cpu", "device=cpu: device is a group of keys: set one of device.kind, device.attention"),
        ("beta=0.2", "beta=0.2: unknown key; did you mean loss.beta?"),
        ("loss.bata=0.2", "loss.bata=0.2: unknown key; did you mean loss.beta?"),
        ("+optim.lr=1", "optim.lr=1: unknown key; did you mean optimizer.lr?"),
        ("optimizer.warmup=1", "optimizer.warmup=1: unknown key; did you mean optimizer.warmup_steps?"),
        ("data.shuffle=false", "data.shuffle=false: unknown key; did you mean train.shuffle?"),
        ("hf_path=x", "hf_path=x: unknown key; did you mean model.hf_path or reference.hf_path?"),
        ("zzz.yyy=null", "zzz.yyy=null: unknown key; the keys are listed in megadpo/config/schema.py"),
        ("train.seed.deep=1", "train.seed={deep: 1}: must be a whole number"),
    ],
)
def test_a_wrong_word_is_named_with_its_remedy(word: str, message: str) -> None:
    (line,) = compose_violations("+model=demo", "data.train_path=x", word)
    assert line.startswith(message)


def test_all_wrong_words_are_reported_at_once() -> None:
    lines = compose_violations("+model=hf", "lr=1", "optimizer.eps=tiny", "~train", "parallel=2", "parallel.tensor=2")
    assert [line.split()[0] for line in lines] == [
        "~train:",
        "parallel=2:",
        "lr=1:",
        "data.train_path",
        "optimizer.eps=tiny:",
    ]


def test_a_directory_without_config_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.yaml there"):
        compose_config(["+model=hf"], config_dir=tmp_path)


def test_a_broken_group_file_is_an_error_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "config.yaml").write_text("defaults: [_self_]\n")
    (tmp_path / "model" / "a.yaml").write_text("name: [a\n")
    with pytest.raises(ConfigError, match=r"a\.yaml"):
        compose_config(["+model=a"], config_dir=tmp_path)


# YAML


@pytest.mark.parametrize("text", ["1e3", "null", "true", "~", "a: b", "007", "ünï cöde", "# x", " y ", "a\nb", "1_0"])
def test_odd_texts_survive_the_round_trip(text: str, all_keys_set: Config) -> None:
    config = replace(all_keys_set, data=replace(all_keys_set.data, train_path=[text], validation_path={text: text}))
    assert config_from_yaml(config_to_yaml(config)) == config


def test_yaml_holds_plain_values_of_every_key(files: dict[str, str]) -> None:
    text = config_to_yaml(build(files))
    assert "dtype: bf16\n" in text
    assert "!!" not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must be a mapping of groups"),
        ("model: {name: a", "not YAML"),
        ("model: {name: a}", "data.train_path is required: it is missing in the file"),
        ("model: {name: a}\ndata: {train_path: x, max_len: 3}", "data.max_len=3: unknown key; did you mean"),
    ],
)
def test_a_wrong_file_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        config_from_yaml(text)


# Defaults that depend on something


def test_resolve_defaults_fills_a_copy(files: dict[str, str]) -> None:
    now = datetime(2031, 2, 3, 4, 5, 6)
    config = build(files)
    resolved = resolve_defaults(config, now)
    assert resolved.train.run_dir == "outputs/2031-02-03_04-05-06-hf"
    assert resolved.parallel.sequence_parallel is False
    assert config.train.run_dir is None
    assert resolve_defaults(resolved, datetime(2032, 1, 1)) == resolved


@pytest.mark.parametrize(("given", "expected"), [("null", True), ("false", False), ("true", True)])
def test_sequence_parallel_follows_tensor_unless_given(given: str, expected: bool, files: dict[str, str]) -> None:
    config = build(files, "parallel.tensor=2", f"parallel.sequence_parallel={given}")
    assert resolve_defaults(config, datetime(2031, 1, 1)).parallel.sequence_parallel is expected


# Rules between keys


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        ([], 1),
        (["parallel.tensor=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2"], 8),
        (["parallel.tensor=4"], 4),
        (["loss.name=ipo", "loss.ipo_length_normalize=false"], 1),
        (["data.validation_fraction=0.1", "train.eval_every=5"], 1),
        (["optimizer.schedule=constant", "optimizer.warmup_steps=3", "train.max_steps=4", "train.epochs=3"], 1),
        (["train.resume=auto", "train.run_dir=no/such/dir/yet"], 1),
    ],
)
def test_sensible_configurations_pass(overrides: list[str], world_size: int, files: dict[str, str]) -> None:
    config = build(files, *overrides)
    before = config_to_dict(config)
    validate(config, world_size=world_size, shape=SHAPE)
    assert config_to_dict(config) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("parallel.tensor=2", "parallel.tensor=2, parallel.pipeline=1: their product 2 must divide the world size 1: "),
        ("parallel.virtual_pipeline=2", "parallel.virtual_pipeline=2: needs parallel.pipeline >= 2, it is 1: raise it"),
        ("parallel.sequence_parallel=true", "parallel.sequence_parallel=true: needs parallel.tensor >= 2, it is 1: "),
        ("loss.ipo_length_normalize=false", "loss.ipo_length_normalize=false: has no effect with loss.name=sigmoid"),
        ("optimizer.betas=[0.9,1.0]", "optimizer.betas=[0.9, 1.0]: each must be in [0, 1), as in"),
        ("optimizer.min_lr=1", "optimizer.min_lr=1.0: must be at most optimizer.lr=1e-06: lower it, or raise lr"),
        (
            "optimizer.schedule=constant optimizer.min_lr=1e-9",
            "optimizer.min_lr=1e-09: has no effect with optimizer.schedule=constant: leave it at 0",
        ),
        (
            "train.max_steps=4 optimizer.warmup_steps=4",
            "optimizer.warmup_steps=4: must be below train.max_steps=4: shorten the warm-up",
        ),
        ("train.eval_every=2", "train.eval_every=2: has no effect without a validation set: give"),
        ("train.resume=auto", "train.resume=auto: needs train.run_dir: a directory named by the clock is always new"),
        ("train.resume=no/such", "train.resume=no/such: must be auto, never or an existing checkpoint directory"),
        ("trackers=tensorboard", "trackers=[tensorboard]: must include jsonl, which reports and resuming read: "),
        ("trackers=[]", "trackers=[]: must include jsonl"),
        ("trackers=[jsonl,jsonl]", "trackers=[jsonl, jsonl]: must name each tracker once"),
        (
            "device.attention=varlen device.kind=cpu",
            "device.attention=varlen: needs CUDA, it is device.kind=cpu: use device.attention=auto or sdpa",
        ),
        (
            "device.attention=varlen precision.dtype=fp32",
            "device.attention=varlen: needs precision.dtype=bf16, it is fp32: use device.attention=auto or sdpa",
        ),
        (
            "precision.backend=transformer_engine device.kind=cpu",
            "precision.backend=transformer_engine: needs CUDA, it is device.kind=cpu: use precision.backend=auto or "
            "native",
        ),
        (
            "device.attention=transformer_engine precision.dtype=fp32",
            "device.attention=transformer_engine: needs precision.dtype=bf16, it is fp32: use device.attention=auto or "
            "sdpa",
        ),
        (
            "model.checkpoint=/",
            "model.checkpoint=/: must be the only source of weights, model.hf_path=",
        ),
        (
            "model.hf_path=null model.checkpoint=no/such",
            "model.checkpoint=no/such: must be the directory of a checkpoint or a run: check the path",
        ),
        (
            "model.hf_path=no/such",
            "model.hf_path=no/such: must be a Hugging Face directory with a config.json: download",
        ),
        ("reference.hf_path=no/such", "reference.hf_path=no/such: must be a Hugging Face directory with a config.json"),
        (
            "reference.mode=none",
            "reference.mode=none: loss.name=sigmoid compares with a reference: choose reference.mode=resident, "
            "offload or cached, or a loss that needs none (",
        ),
        (
            "reference.cache_dir=x",
            "reference.cache_dir=x: has no effect with reference.mode=resident: drop it, or use reference.mode=cached",
        ),
        (
            "reference.mode=cached reference.sync_every=2",
            "reference.sync_every=2: needs weights to mix, reference.mode=cached has none: use reference.mode=resident",
        ),
        (
            "reference.sync_mix=0.5",
            "reference.sync_mix=0.5: has no effect without reference.sync_every: set it, or drop sync_mix",
        ),
        ("data.train_path=no/such", "data.train_path=no/such: must be an existing file: check the path"),
        ("data.train_path=[]", "data.train_path=[]: must name at least one file"),
        ("data.validation_path=no/such", "data.validation_path=no/such: must be an existing file"),
        ("data.validation_path={a: no/such}", "data.validation_path=no/such: must be an existing file"),
        ("data.validation_path={}", "data.validation_path={}: must name at least one file, or be null"),
        (
            "data.chosen_key=prompt",
            "data.prompt_key=prompt, data.chosen_key=prompt, data.rejected_key=rejected: must be",
        ),
        (
            "model.hf_path=outputs/demo/none",
            "model.hf_path=outputs/demo/none: must be a Hugging Face directory with a ",
        ),
    ],
)
def test_a_broken_rule_is_the_one_violation(overrides: str, message: str, files: dict[str, str]) -> None:
    words = [overrides] if ": " in overrides else overrides.split()
    (line,) = violations(files, *words)
    assert line.startswith(message)


def test_a_loss_without_a_reference_goes_with_mode_none_only(
    files: dict[str, str],
) -> None:
    alone = "loss.name=[simpo,sft]"
    for mode in ("resident", "offload", "cached"):
        (line,) = violations(files, alone, f"reference.mode={mode}")
        assert line.startswith(
            f"reference.mode={mode}: has no effect with loss.name=[simpo, sft], which uses no reference"
        )
    validate(build(files, alone, "reference.mode=none"), world_size=1)
    (line,) = violations(files, alone, "reference.mode=none", f"reference.hf_path={files['model.hf_path']}")
    assert line.endswith("has no effect with reference.mode=none: drop it, or choose another mode")
    (line,) = violations(files, alone, "reference.mode=none", "reference.sync_every=1", "reference.sync_mix=1")
    assert line.startswith("reference.sync_every=1: needs weights to mix, reference.mode=none has none")


def test_a_cache_lies_in_the_run_directory_unless_named(files: dict[str, str]) -> None:
    for word, expected in (("train.run_dir=run", "run/reference"), ("reference.cache_dir=x", "x")):
        config = resolve_defaults(build(files, "reference.mode=cached", word), datetime(2025, 1, 31))
        assert config.reference.cache_dir == expected
    assert resolve_defaults(build(files), datetime(2025, 1, 31)).reference.cache_dir is None


def test_missing_demo_files_say_how_to_make_them(files: dict[str, str]) -> None:
    for override in ("model.hf_path=outputs/demo/none", "data.train_path=outputs/demo/none.jsonl"):
        (line,) = violations(files, override)
        assert line.endswith("python tools/make_demo.py prepare (or the whole run: make demo)")


def test_two_validation_sources_are_refused(files: dict[str, str]) -> None:
    path = Path(files["data.train_path"]).with_name("valid.jsonl")
    (line,) = violations(files, f"data.validation_path={path}", "data.validation_fraction=0.1")
    assert line.startswith("data.validation_fraction=0.1: must be 0 when data.validation_path is given: drop one")


@pytest.mark.parametrize(
    ("layout", "messages"),
    [
        ({"tensor": 3}, ["8 attention heads: use parallel.tensor=2", "64 MLP channels", "2 key-value heads or be"]),
        ({"pipeline": 3}, ["parallel.pipeline=3: 3 equal parts cannot be cut from the model's 8 layers"]),
        (
            {"pipeline": 4, "virtual_pipeline": 3},
            ["parallel.pipeline=4, parallel.virtual_pipeline=3: 12 equal parts cannot be cut"],
        ),
        ({"tensor": 16}, ["parallel.tensor=16: must divide the model's 8 attention heads: use parallel.tensor=8"]),
    ],
)
def test_the_layout_must_fit_the_model(layout: dict[str, int], messages: list[str], files: dict[str, str]) -> None:
    words = [f"parallel.{key}={value}" for key, value in layout.items()]
    found = violations(files, *words, world_size=layout.get("tensor", 1) * layout.get("pipeline", 1))
    assert len(found) == len(messages)
    assert all(message in line for message, line in zip(messages, found, strict=True))


def test_all_broken_rules_are_reported_at_once(files: dict[str, str]) -> None:
    found = violations(files, "loss.beta=-1", "parallel.tensor=3", "train.eval_every=2", "trackers=[]", world_size=2)
    assert [line.split("=")[0] for line in found] == [
        "loss.beta",
        "parallel.tensor",
        "parallel.tensor",
        "parallel.tensor",
        "parallel.tensor",
        "train.eval_every",
        "trackers",
    ]


def test_a_zero_layout_is_reported_without_dividing_by_it(files: dict[str, str]) -> None:
    assert violations(files, "parallel.tensor=0") == ["parallel.tensor=0: must be a finite number >= 1"]


# The run directory


def test_a_used_run_dir_needs_resuming(tmp_path: Path, files: dict[str, str]) -> None:
    run = tmp_path / "run"
    config = build(files, f"train.run_dir={run}")
    check_run_dir_is_fresh(config)
    run.mkdir()
    (run / "reference").mkdir()
    check_run_dir_is_fresh(config)
    (run / "metrics.jsonl").write_text("")
    validate(config, world_size=1)
    with pytest.raises(ConfigError, match=r"must be empty with train.resume=never: continue its own run with"):
        check_run_dir_is_fresh(config)
    with pytest.raises(ConfigError, match=r"no config.yaml, so it is not the directory of a run"):
        check_run_dir_is_fresh(build(files, f"train.run_dir={run}", "train.resume=auto"))
    (run / "config.yaml").write_text("")
    check_run_dir_is_fresh(build(files, f"train.run_dir={run}", "train.resume=auto"))
    (run / "checkpoints" / "step_00000003").mkdir(parents=True)
    check_run_dir_is_fresh(build(files, f"train.run_dir={run}", f"train.resume={run}/checkpoints/step_00000003"))
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(ConfigError, match=r"must be empty with train.resume="):
        check_run_dir_is_fresh(build(files, f"train.run_dir={run}", f"train.resume={other}"))


def test_a_file_is_no_run_dir(files: dict[str, str]) -> None:
    (line,) = violations(files, f"train.run_dir={files['data.train_path']}")
    assert line.endswith("must be a directory, it is a file: choose another path")


def test_an_existing_resume_directory_passes(tmp_path: Path, files: dict[str, str]) -> None:
    validate(build(files, f"train.resume={tmp_path}"), world_size=1)


def test_composing_leaves_no_hydra_state_behind() -> None:
    compose_config(["+model=demo", "+experiment=demo"])
    assert not GlobalHydra.instance().is_initialized()


def test_validation_files_names_each_set(files: dict[str, str]) -> None:
    assert build(files).data.validation_files() == {}
    assert build(files, "data.validation_path=v.jsonl").data.validation_files() == {"": "v.jsonl"}
    assert build(files, "data.validation_path={a: x, b: y}").data.validation_files() == {"a": "x", "b": "y"}


def test_wrong_types_and_broken_rules_come_together(files: dict[str, str]) -> None:
    """A rule is checked though other keys are wrong; what it says of a key with a stand-in is left out."""
    words = [
        "+model=hf",
        *(f"{key}={value}" for key, value in files.items()),
        "optimizer.lr=abc",
        "optimizer.min_lr=1",
        "loss.beta=-1",
        "data.train_pth=x",
    ]
    with pytest.raises(ConfigError) as caught:
        compose_config(words, check=lambda config: validate(config, world_size=1))
    text = "\n".join(caught.value.violations)
    assert len(caught.value.violations) == 3, text
    for expected in ("data.train_pth=x: unknown", "optimizer.lr=abc: must be a number", "loss.beta=-1.0: must be"):
        assert expected in text


def test_a_checkpoint_inside_an_interval_of_metrics_is_refused(files: dict[str, str]) -> None:
    (text,) = violations(files, "train.log_every=3", "train.save_every=4")
    assert text.startswith("train.save_every=4: must be a multiple of train.log_every=3")
    validate(build(files, "train.log_every=3", "train.save_every=6"), world_size=1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["checkpoint.keep_every=5", "train.save_every=3"],
            "checkpoint.keep_every=5: must be a multiple of train.save",
        ),
        (["checkpoint.keep_every=5"], "checkpoint.keep_every=5: must be a multiple of train.save_every=null"),
        (["checkpoint.keep_best=eval/loss"], "checkpoint.keep_best=eval/loss: needs a validation set"),
        (
            ["checkpoint.keep_best=loss", *(judged := ["data.validation_fraction=0.1", "train.eval_every=2"])],
            "checkpoint.keep_best=loss: must be one of eval/loss, eval/rewards/accuracies, eval/rewards/margins",
        ),
        (
            ["checkpoint.keep_best=eval/loss", "train.save_every=3", *judged],
            "checkpoint.keep_best=eval/loss: needs an evaluation of every checkpoint",
        ),
        (["train.resume_changes=[loss]"], "train.resume_changes=[loss]: has no effect with train.resume=never"),
    ],
)
def test_what_is_kept_and_changed_can_be_decided(words: list[str], said: str, files: dict[str, str]) -> None:
    assert any(text.startswith(said) for text in violations(files, *words))


def test_a_checkpoint_may_be_kept_by_what_every_one_is_judged_by(files: dict[str, str]) -> None:
    judged = ["data.validation_fraction=0.1", "train.eval_every=2", "train.save_every=4", "checkpoint.keep_every=8"]
    validate(build(files, "checkpoint.keep_best=eval/rewards/margins", *judged), world_size=1)


def test_restarts_must_go_on(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ConfigError) as caught:
        check(build(files))
    said = "torchrun --max-restarts=3, train.resume=never: a run that is started again must go on from its newest"
    assert any(text.startswith(said) for text in caught.value.violations)
    with pytest.raises(ConfigError) as caught:  # for the model, which is none
        check(build(files, "train.resume=auto", "train.run_dir=out/run"))
    assert not any("max-restarts" in text for text in caught.value.violations)


def test_a_reference_must_fit_the_layout_and_share_the_vocabulary(files: dict[str, str]) -> None:
    other = ModelShape(num_layers=8, num_attention_heads=3, num_query_groups=1, ffn_hidden_size=64, vocab_size=500)
    config = build(files, "parallel.tensor=2", "parallel.pipeline=2")
    with pytest.raises(ConfigError) as caught:
        validate(config, world_size=4, shape=SHAPE, reference_shape=other)
    heads, vocabulary = caught.value.violations
    assert "must divide the reference's 3 attention heads" in heads
    assert "its vocabulary has 500 entries, the policy's 401" in vocabulary


def test_credentials_of_a_url_are_refused_and_never_repeated(files: dict[str, str]) -> None:
    found = violations(
        files,
        "data.train_path=['https://me:pa@ss@host/a.jsonl']",
        "data.validation_path={easy: 'ssh://token@host/b.jsonl'}",
        "train.run_dir='s3://key:secret@bucket/run'",
    )
    told = [text.partition(":")[0] for text in found if "credentials of a URL" in text]
    assert told == ["data.train_path=https", "data.validation_path.easy=ssh", "train.run_dir=s3"]
    assert "train.run_dir=s3://***@bucket/run: must not hold the credentials of a URL" in "\n".join(found)
    assert not any(secret in text for text in found for secret in ("me:pa", "ss@", "token", "key:", "secret"))
