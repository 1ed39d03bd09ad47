"""Hugging Face -> checkpoint -> Hugging Face is bit-equal; a checkpoint stands alone and starts runs at any layout."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megadpo.checkpoint.manifest import write_manifest
from tests.helpers.hostile import HOSTILE
from tests.helpers.jobs.conversion import compare, export_hf, import_hf, import_hf_without_room
from tests.helpers.jobs.training import train, train_while_a_directory_vanishes
from tests.helpers.launch import launch
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import assert_same_trajectory, write_jsonl
from tests.helpers.tiny_models import write_tiny_model

LR = 1e-3
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# family -> (the model, ranks of the import, ranks of the export)
MODELS: dict[str, tuple[dict[str, Any], int, int]] = {
    "llama": ({"dtype": torch.bfloat16, "rope": LLAMA3_ROPE, "max_shard_size": "100KB"}, 1, 2),
    "mistral": ({"tied": True}, 2, 1),
    "qwen2": ({"tied": True, "max_shard_size": "100KB"}, 1, 1),
    "qwen3": ({"dtype": torch.bfloat16, "head_dim": 32}, 2, 2),
}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face directory, whatever files they lie in."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_model(expected: Path, actual: Path) -> None:
    """Fails unless weights are bit-equal and the files beside them the same bytes."""
    before, after = weights(expected), weights(actual)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (actual / file).read_bytes() == (expected / file).read_bytes()


@pytest.mark.parametrize("family", MODELS)
def test_round_trip_is_bit_equal(family: str, tmp_path: Path) -> None:
    options, importing, exporting = MODELS[family]
    model = write_tiny_model(tmp_path / "model", family, **options)
    assert (model / "model.safetensors.index.json").exists() == ("max_shard_size" in options)
    launch(importing, import_hf, Path(os.path.relpath(model)), tmp_path / "checkpoint")
    shutil.copytree(model, tmp_path / "kept")
    shutil.rmtree(model)  # the checkpoint stands alone
    launch(exporting, export_hf, tmp_path / "checkpoint", tmp_path / "back")
    assert_same_model(tmp_path / "kept", tmp_path / "back")
    card = (tmp_path / "back" / "README.md").read_text()
    assert f"Converted from the Megatron checkpoint {tmp_path / 'checkpoint'}" in card
    assert f"Imported from {model}." in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "checkpoint", "kept"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A directory with a tied fp32 model, pairs, and the model's checkpoint; and the words of a run on them."""
    root = tmp_path_factory.mktemp("convert")
    write_tiny_model(root / "model", "qwen3", tied=True)
    data = write_jsonl(root / "pairs.jsonl", make_pairs(12, seed=3))
    launch(1, import_hf, root / "model", root / "imported")
    words = ["+model=hf", f"data.train_path={data}", "data.max_length=256", "data.tokens_per_microbatch=700"]
    words += ["train.global_batch_size=4", "train.max_steps=3", "train.save_every=2", f"optimizer.lr={LR}"]
    words += ["precision.dtype=fp32", "device.kind=cpu", "trackers=jsonl"]
    return root, words


def test_verify_finds_a_changed_weight(made: tuple[Path, list[str]]) -> None:
    root, _ = made
    changed = shutil.copytree(root / "model", root / "changed")
    tensors = weights(changed)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] += 0.25
    tensors["model.embed_tokens.weight"][400, 0] += 2.0**-6
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    (equal, printed), (other, _) = launch(2, compare, changed, root / "imported")
    assert (equal, other) == (False, False)
    assert "file that differs" not in printed
    rows = [line.split() for line in printed.splitlines() if ".weight" in line]
    assert [(row[1], row[3], float(row[5])) for row in rows] == [
        ("model.embed_tokens.weight", "1", pytest.approx(2.0**-6, rel=1e-2)),
        ("model.layers.2.mlp.up_proj.weight", "1", pytest.approx(0.25, rel=1e-2)),
    ]


def test_verify_finds_another_chat_template(made: tuple[Path, list[str]]) -> None:
    root, _ = made
    other = shutil.copytree(root / "imported", root / "other_template")
    with (other / "hf" / "chat_template.jinja").open("a") as file:
        file.write("!")
    ((equal, printed),) = launch(1, compare, root / "model", other)
    assert not equal
    assert "chat_template.jinja" in printed
    assert "weight that differs" not in printed


def test_verify_compares_log_probs_with_transformers(made: tuple[Path, list[str]]) -> None:
    root, _ = made
    (equal, printed), _ = launch(2, compare, root / "model", root / "imported", root / "pairs.jsonl")
    assert equal
    assert len([line for line in printed.splitlines() if "chosen" in line or "rejected" in line]) == 2 * 3


def test_verify_refuses_another_model(made: tuple[Path, list[str]]) -> None:
    root, _ = made
    other = write_tiny_model(root / "other", "qwen3", tied=True, num_layers=2)
    with pytest.raises(RuntimeError, match=r"models of another shape or kind(.|\n)*num_layers is 2 instead of 4"):
        launch(1, compare, other, root / "imported")


def test_bf16_is_verified_as_rounded(made: tuple[Path, list[str]]) -> None:
    """An fp32 model imported in bf16: every value is the rounded one, on transformers' side too."""
    root, _ = made
    launch(1, import_hf, root / "model", root / "rounded", "bf16")
    ((equal, _),) = launch(1, compare, root / "model", root / "rounded", root / "pairs.jsonl")
    assert equal
    assert json.loads((root / "rounded" / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_checkpoint_that_cannot_be_written_is_told(made: tuple[Path, list[str]], tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeError, match=r"CheckpointError: .*\.out\.partial/__0_\d\.distcp: can't be written .*make room"
    ):
        launch(1, import_hf_without_room, made[0] / "model", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def run_from_checkpoint(made: tuple[Path, list[str]]) -> Path:
    """A run at tp2 that starts from the imported checkpoint."""
    root, words = made
    start = [f"model.checkpoint={root / 'imported'}", f"train.run_dir={root / 'from_checkpoint'}"]
    launch(2, train, [*words, *start, "parallel.tensor=2"])
    return root / "from_checkpoint"


def test_a_run_from_a_checkpoint_is_the_run_from_its_source(
    made: tuple[Path, list[str]], run_from_checkpoint: Path
) -> None:
    root, words = made
    # Which is needed at the start only: saves and the export find its tokenizer all the same.
    source = shutil.copytree(root / "model", root / "vanishing")
    words = [*words, f"model.hf_path={source}", f"train.run_dir={root / 'from_hf'}"]
    launch(1, train_while_a_directory_vanishes, words, source)
    assert not source.exists()
    assert_same_trajectory(root / "from_hf", run_from_checkpoint, lr=LR)


def test_the_export_of_a_run_is_its_hf_directory(made: tuple[Path, list[str]], run_from_checkpoint: Path) -> None:
    root, _ = made
    launch(2, export_hf, run_from_checkpoint, root / "exported")
    assert_same_model(run_from_checkpoint / "hf", root / "exported")
    exported, handed_back = (
        (d / "model.safetensors").read_bytes() for d in (root / "exported", run_from_checkpoint / "hf")
    )
    assert exported == handed_back
    assert "Trained for 3 steps from imported." in (root / "exported" / "README.md").read_text()


def test_a_run_starts_from_another_run(made: tuple[Path, list[str]], run_from_checkpoint: Path) -> None:
    """With its weights and a fresh optimizer, as from its hf/ directory; at another layout."""
    root, words = made
    for name, start in (
        ("a", f"model.checkpoint={run_from_checkpoint}"),
        ("b", f"model.hf_path={run_from_checkpoint / 'hf'}"),
    ):
        layout = ["parallel.pipeline=2"] if name == "a" else []
        launch(1 + len(layout), train, [*words, *layout, start, f"train.run_dir={root / name}"])
    assert_same_trajectory(root / "b", root / "a", lr=LR)
    # The step is in the configuration: a run that goes on does not start from where `latest` points by then.
    assert f"{run_from_checkpoint / 'checkpoints' / 'step_00000003'}" in (root / "a" / "config.yaml").read_text()


def test_what_cannot_start_a_run_is_named(made: tuple[Path, list[str]], tmp_path: Path) -> None:
    root, words = made
    words = [*words, f"train.run_dir={tmp_path / 'run'}"]
    with pytest.raises(
        RuntimeError, match=r"an imported checkpoint holds weights and no training to go on with: start"
    ):
        launch(1, train, [*words, f"model.hf_path={root / 'model'}", f"train.resume={root / 'imported'}"])

    untied = write_tiny_model(tmp_path / "untied", "qwen3")
    launch(1, import_hf, untied, tmp_path / "untied_checkpoint")
    for checkpoint, tied, said in (
        (shutil.copytree(root / "imported", tmp_path / "fewer"), "true", "output_layer.weight is missing"),
        (tmp_path / "untied_checkpoint", "false", "output_layer.weight has no place in the model"),
    ):
        config = checkpoint / "hf" / "config.json"
        other = {"true": "false", "false": "true"}[tied]
        field = '"tie_word_embeddings": '
        assert field + tied in config.read_text()
        config.write_text(config.read_text().replace(field + tied, field + other))
        with pytest.raises(RuntimeError, match=rf"1 weights don't fit its hf/config.json, which is .*\n  {said}"):
            launch(1, train, [*words, f"model.checkpoint={checkpoint}"])

    larger = shutil.copytree(root / "imported", tmp_path / "larger")
    config = larger / "hf" / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 401', '"vocab_size": 402'))
    said = r"larger: its weights have a vocabulary of 401 entries, hf/config.json says vocab_size = 402, which is not"
    with pytest.raises(RuntimeError, match=said):
        launch(1, train, [*words, f"model.checkpoint={larger}"])

    for name, content in (("common.pt", b""), (".metadata", b"torn"), ("__0_0.distcp", b"")):
        torn = shutil.copytree(root / "imported", tmp_path / f"torn{name}")
        (torn / name).write_bytes(content)
        said = rf"CheckpointError: checkpoint .*torn.* is damaged, name another one[^\n]*\n +{re.escape(name)} has"
        with pytest.raises(RuntimeError, match=said):
            launch(1, train, [*words, f"model.checkpoint={torn}"])


@pytest.mark.parametrize("place", HOSTILE)
def test_a_checkpoint_runs_no_program(made: tuple[Path, list[str]], tmp_path: Path, place: str) -> None:
    root, words = made
    checkpoint, mark = shutil.copytree(root / "imported", tmp_path / "hostile"), tmp_path / "mark"
    HOSTILE[place](checkpoint, mark)
    write_manifest(checkpoint, {})  # whoever means harm does that, too
    # Megatron itself stumbles over an object in a tensor's place, before it unpickles it.
    said = "not enough values to unpack" if place == "tensor" else r"posix\.mkdir.*Don't trust this checkpoint"
    with pytest.raises(RuntimeError, match=rf"CheckpointError: .*hostile.*{said}"):
        launch(1, train, [*words, f"train.run_dir={tmp_path / 'run'}", f"model.checkpoint={checkpoint}"])
    assert not mark.exists()
