"""Named models: their shapes are the published ones, their layouts fit, and weights of another model are refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megadpo.commands.command_line import check
from megadpo.config.compose import compose_config
from megadpo.config.schema import Config
from megadpo.errors import ConfigError
from megadpo.models.hf_config import parse_architecture
from megadpo.setup.trainer import build_loss
from tests.helpers.published import LLAMA_3_8B, LLAMA_3_70B, PUBLISHED, QWEN_2_5_7B_INSTRUCT

# name: the published model, parallel.tensor, parallel.pipeline
PRESETS = {
    "llama3_8b": ("Llama-3-8B", 2, 1),
    "llama70b": ("Llama-3-70B", 8, 4),
    "qwen2_5_7b": ("Qwen2.5-7B", 2, 1),
    "qwen3_8b": ("Qwen3-8B", 2, 1),
}


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    """The words that every configuration needs besides the model."""
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    return f"data.train_path={path}"


def ranks(monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(world_size))


def checked(*words: str) -> Config:
    return compose_config(words, check=check)


def violations(*words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        checked(*words)
    return caught.value.violations


def write_config(directory: Path, fields: dict[str, object]) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


@pytest.mark.parametrize(
    ("name", "terms", "mode"),
    [
        ("ipo", [(1.0, "ipo")], "resident"),
        ("rpo", [(1.0, "sigmoid"), (1.0, "sft")], "resident"),
        ("mpo", [(0.8, "sigmoid"), (0.2, "bco_pair"), (1.0, "sft")], "resident"),
        ("simpo", [(1.0, "simpo")], "none"),
    ],
)
def test_losses_of_the_field_have_files(
    name: str, terms: list[tuple[float, str]], mode: str, pairs: str, tmp_path: Path
) -> None:
    directory = write_config(tmp_path / "model", PUBLISHED["Llama-3-8B"][0])
    config = checked("+model=hf", f"model.hf_path={directory}", f"+loss={name}", pairs)
    assert (list(build_loss(config).terms), config.reference.mode) == (terms, mode)


@pytest.mark.parametrize("name", PRESETS)
def test_shape_is_the_published_one(name: str) -> None:
    fields, parameters = PUBLISHED[PRESETS[name][0]]
    config = compose_config([f"+model={name}", "data.train_path=x"])
    assert config.model.name == name and config.model.hf_path is None and config.model.shape is not None
    arch = parse_architecture(config.model.shape, source=name)
    assert arch == parse_architecture(fields, source="published")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**copy.deepcopy(config.model.shape)))
    assert arch.num_parameters == parameters == sum(value.numel() for value in model.parameters())
    head = (Path(__file__).parents[3] / "conf" / "model" / f"{name}.yaml").read_text().splitlines()[1]
    assert f"{parameters:,} parameters".replace(",", " ") in head


@pytest.mark.parametrize("name", PRESETS)
def test_layout_defaults_fit_the_model(name: str, tmp_path: Path, pairs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    published, tensor, pipeline = PRESETS[name]
    ranks(monkeypatch, 2 * tensor * pipeline)
    directory = write_config(tmp_path / "model", PUBLISHED[published][0])
    config = checked(f"+model={name}", f"model.hf_path={directory}", pairs)
    assert (config.parallel.tensor, config.parallel.pipeline) == (tensor, pipeline)
    assert config.parallel.overlap_grad_reduce and config.parallel.overlap_param_gather


def test_layouts_of_the_command_line_win(tmp_path: Path, pairs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks(monkeypatch, 4)
    directory = write_config(tmp_path / "model", LLAMA_3_70B)
    words = ("parallel.pipeline=1", "+model=llama70b", f"model.hf_path={directory}", "parallel.tensor=4", pairs)
    config = checked(*words)
    assert (config.parallel.tensor, config.parallel.pipeline) == (4, 1)


def test_chat_versions_of_a_named_model_pass(tmp_path: Path, pairs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks(monkeypatch, 2)
    directory = write_config(tmp_path / "model", QWEN_2_5_7B_INSTRUCT)
    assert checked("+model=qwen2_5_7b", f"model.hf_path={directory}", pairs).model.hf_path == str(directory)


def test_weights_of_another_model_are_refused_with_all_differences(
    tmp_path: Path, pairs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks(monkeypatch, 32)
    directory = write_config(tmp_path / "model", LLAMA_3_8B)
    assert violations("+model=llama70b", f"model.hf_path={directory}", pairs) == [
        f"model.hf_path={directory}: must be a llama70b (model.shape), it differs: num_layers is 32 instead of 80; "
        "hidden_size is 4096 instead of 8192; ffn_hidden_size is 14336 instead of 28672; num_attention_heads is 32 "
        f"instead of 64: use +model=hf model.hf_path={directory}, which takes any supported model"
    ]


def test_without_weights_there_is_no_training(pairs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks(monkeypatch, 2)
    assert violations("+model=qwen3_8b", pairs) == [
        "model.hf_path=null: qwen3_8b is known by its shape, and weights must come from somewhere: give "
        "model.hf_path=DIR or model.checkpoint=DIR"
    ]


@pytest.mark.parametrize("hf_path", ["null", "no/such"])
def test_layouts_are_checked_without_the_weights_and_all_mistakes_come_at_once(
    hf_path: str, pairs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks(monkeypatch, 9)
    words = (f"model.hf_path={hf_path}", "parallel.tensor=3", "parallel.pipeline=3", "loss.beta=-1", "lr=1")
    lines = violations("+model=llama70b", pairs, *words)
    assert [line.split(":")[0] for line in lines] == [
        "lr=1",
        "loss.beta=-1.0",
        f"model.hf_path={hf_path}",
        *["parallel.tensor=3"] * 3,
        "parallel.pipeline=3",
    ]
    assert "must divide the model's 64 attention heads" in lines[3]
    assert "equal parts cannot be cut from the model's 80 layers" in lines[-1]


def test_a_shape_that_is_not_supported_is_named_by_its_key(
    tmp_path: Path, pairs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks(monkeypatch, 2)
    directory = write_config(tmp_path / "model", LLAMA_3_8B)
    words = ("model.shape.hidden_act=gelu", f"model.hf_path={directory}")
    (line,) = violations("+model=llama3_8b", *words, pairs)
    assert line.startswith('model.shape: 1 not supported:\n  hidden_act = "gelu" must be silu')


def test_checkpoints_of_another_model_are_refused(tmp_path: Path, pairs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks(monkeypatch, 2)
    checkpoint = tmp_path / "imported"
    checkpoint.mkdir()
    (checkpoint / "imported.json").write_text("{}")
    write_config(checkpoint / "hf", LLAMA_3_8B)
    assert checked("+model=llama3_8b", f"model.checkpoint={checkpoint}", pairs).model.hf_path is None
    (line,) = violations("+model=llama3_8b", "model.shape.rope_theta=10000", f"model.checkpoint={checkpoint}", pairs)
    assert line.startswith(f"model.checkpoint={checkpoint}: must be a llama3_8b (model.shape), it differs: inv_freq ")
    assert line.endswith(f"use +model=hf model.checkpoint={checkpoint}, which takes any supported model")
