"""The command lines of score.py and convert.py: mistakes are told at once, before anything is read or written."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from megadpo.commands.score_files import Role, ScoreFiles, ScoreWriter
from megadpo.commands.score_summary import Buckets
from megadpo.commands.verify import stages
from megadpo.config.choices import ReferenceMode
from megadpo.config.schema import LossConfig, ReferenceConfig
from megadpo.errors import ConfigError, MegaDPOError
from megadpo.models.hf_config import read_architecture
from tests.helpers.pairs import make_pairs
from tests.helpers.runs import write_jsonl
from tests.helpers.tiny_models import write_tiny_model
from tools import convert, score


@pytest.fixture(autouse=True)
def process_as_it_was() -> Iterator[None]:
    """Takes back what a tool does to this process: its set-up of logging, and groups that outlive an error."""
    logger = logging.getLogger("megadpo")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = before
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A model, and the words that name it and some pairs."""
    root = tmp_path_factory.mktemp("words")
    model = write_tiny_model(root / "model", "llama")
    data = write_jsonl(root / "pairs.jsonl", make_pairs(2, seed=0))
    return model, ["+model=hf", f"model.hf_path={model}", f"data.train_path={data}"]


def test_own_words_are_taken_out(files: tuple[Path, list[str]]) -> None:
    words = [*files[1], "output=there/scores.jsonl", "data.max_length=9"]
    config, output, buckets = score.read_words(words)
    assert output == Path("there/scores.jsonl")
    assert config.data.max_length == 9
    assert buckets == Buckets(by="response", count=4)
    assert score.read_words([*words, "buckets=7", "bucket_by=stream"])[2] == Buckets(by="stream", count=7)
    assert score.read_words([*words, "buckets=[10, 20]"])[2] == Buckets(edges=(10, 20))


def test_a_reference_gives_its_keys_an_effect(files: tuple[Path, list[str]]) -> None:
    words = [*files[1], "output=x", "loss.beta=0.5"]
    config, *_ = score.read_words([*words, f"reference.hf_path={files[0]}"])
    assert (config.loss.beta, config.reference.hf_path) == (0.5, str(files[0]))
    config, *_ = score.read_words([*files[1], "output=x", "reference.cache_dir=kept"])
    assert (config.reference.mode, config.reference.cache_dir) == (ReferenceMode.cached, "kept")
    with pytest.raises(ConfigError) as caught:
        score.read_words([*words, "reference.mode=resident", "precision.fp8_check_every=5", "loss.name=ipo"])
    assert caught.value.violations == [
        "reference.mode=resident: has no effect when scoring: drop it",
        "precision.fp8_check_every=5: has no effect when scoring: drop it",
        "loss.name=ipo: has no effect when scoring: drop it",
        "loss.beta=0.5: has no effect without reference.hf_path: drop it, or name a second model",
    ]


@pytest.mark.parametrize(
    "lines",
    [
        "reference: {mode: cached}\n"
        "precision: {fp8_check_every: 5, fp8_check_pairs: 16, fp8: mxfp8, fp8_backend: emulate}",
        "reference: {mode: none}\nloss: {name: [simpo], beta: 0.3}",
        "reference: {sync_every: 4, sync_mix: 1.0}",
    ],
)
def test_what_an_experiment_says_of_training_is_left_out(
    lines: str, files: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = shutil.copytree(score.CONFIG_DIR, tmp_path / "conf")
    (conf / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{lines}\n")
    monkeypatch.setattr(score, "CONFIG_DIR", conf)
    words = ["+experiment=mine", *files[1], "output=x"]
    kept = {"cache_dir": "kept", "mode": ReferenceMode.cached}
    for further, expected in (
        (["reference.cache_dir=null"], {"mode": ReferenceMode.resident}),
        ([f"reference.hf_path={files[0]}", "reference.cache_dir=kept"], {"hf_path": str(files[0]), **kept}),
    ):
        config, *_ = score.read_words([*words, *further])
        assert config.reference == ReferenceConfig(**expected)
        assert config.loss == LossConfig(beta=config.loss.beta) and config.precision.fp8_check_every is None


@pytest.mark.parametrize("text", ["0", "[]", "[20,10]", "[10,10]", "[0,5]", "4,5", "many", "-1", ""])
def test_buckets_that_are_none_are_refused(files: tuple[Path, list[str]], text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"(?s)bucket_by=line: must be one of response, .*buckets=.*: must be how many"
    ):
        score.read_words([*files[1], "output=x", f"buckets={text}", "bucket_by=line"])


def test_all_mistakes_of_a_scoring_at_once(files: tuple[Path, list[str]]) -> None:
    words = ["parallel.tensor=3", "loss.name=ipo", "+loss=ipo", "train.epochs=2", "trackers=jsonl", "data.nonsense=1"]
    with pytest.raises(ConfigError) as caught:
        score.read_words([*files[1], *words])
    said = caught.value.violations
    assert said[:4] == [
        f"{word}: has no effect when scoring: drop it" for word in ("loss.name=ipo", "+loss=ipo", *words[3:5])
    ]
    assert said[4] == "output is required: add output=OUT.jsonl, the file that the scores are written to"
    assert any(text.startswith("data.nonsense=1: unknown key") for text in said)
    assert any("must divide the model's 4 attention heads" in text for text in said)


def test_two_outputs_are_refused(files: tuple[Path, list[str]]) -> None:
    with pytest.raises(ConfigError, match=r"output must name one file, got output=a, output=b"):
        score.read_words([*files[1], "output=a", "output=b"])


def test_a_checkpoint_that_is_none_is_told_with_the_rest(files: tuple[Path, list[str]], tmp_path: Path) -> None:
    words = [word for word in files[1] if "hf_path" not in word]
    with pytest.raises(ConfigError) as caught:
        score.read_words([*words, f"model.checkpoint={tmp_path}", "output=x", "data.max_length=1"])
    assert caught.value.violations[0].startswith(
        f"model.checkpoint={tmp_path}: {tmp_path} holds no complete checkpoint"
    )
    assert caught.value.violations[1].startswith("data.max_length=1: must be")


def test_output_that_is_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a file to write, it is a directory"):
        ScoreFiles(tmp_path).check_output()


def test_each_output_has_a_summary_of_its_own() -> None:
    summaries = [ScoreFiles(Path(name)).summary.name for name in ("a.jsonl", "a.step1", "a.step2")]
    assert summaries == ["a.summary.json", "a.step1.summary.json", "a.step2.summary.json"]


def test_what_is_kept_of_a_pass(tmp_path: Path) -> None:
    """Whole groups of 2, or all 5 pairs; never half a line."""
    files = ScoreFiles(tmp_path / "out.jsonl")
    assert files.begin({"a": 1}, [Role.policy], pairs=5, group_size=2) == {Role.policy: 0}
    path = files.scores(Role.policy)
    for content, kept in (
        ("", 0),
        ("a\nb\nc\n", 2),
        ("a\nb\nc\nd", 2),
        ("a\nb\nc\nd\n", 4),
        ("a\n" * 5, 5),
        ("a\n" * 7, 5),
    ):
        path.write_text(content)
        assert files.begin({"a": 1}, [Role.policy], pairs=5, group_size=2) == {Role.policy: kept}
        assert path.read_text() == content[: 2 * kept]
    (files.partial / "identity.json").unlink()
    assert files.begin({"a": 1}, [Role.policy], pairs=5, group_size=2) == {Role.policy: 0}
    assert path.read_text() == ""


def test_a_full_disk_says_how_to_go_on() -> None:
    with (
        pytest.raises(MegaDPOError, match="/dev/full: No space left on device: make room and start again"),
        ScoreWriter(Path("/dev/full")) as writer,
    ):
        writer.write([{"index": 0}])
    with pytest.raises(MegaDPOError, match=r"none/scores\.jsonl: can't be written \(No such file .*\): make room, or"):
        ScoreWriter(Path("none/scores.jsonl"))


def test_damaged_files_of_a_scoring_are_named(tmp_path: Path) -> None:
    files = ScoreFiles(tmp_path / "out.jsonl")
    files.partial.mkdir()
    identity = files.partial / "identity.json"
    for content in (b"[]", b"{", b"\xff"):
        identity.write_bytes(content)
        with pytest.raises(MegaDPOError, match=r"identity\.json can't be read .*: remove it, and what it belongs"):
            files.known_identity()
    lines = files.scores(Role.policy)
    lines.write_text('{"index": 0}\n!\n')
    with pytest.raises(MegaDPOError, match=r"scores\.jsonl:2: can't be read .*: remove .*out\.jsonl\.partial to start"):
        list(files.read(lines))
    files.scores(Role.reference).write_text('{"index": 1}\n')
    with pytest.raises(
        MegaDPOError, match=r"reference\.jsonl:1: is of pair 1, the policy's line of 0: remove .*partial"
    ):
        files.join(lambda own, _: own)
    files.output.write_text("!")
    with pytest.raises(MegaDPOError, match=r"out\.jsonl:1: can't be read .*: remove .*out\.jsonl to start anew"):
        list(files.read(files.output))
    files.summary.write_text('{"identity": 3}')
    with pytest.raises(MegaDPOError, match=r"out\.summary\.json can't be read \(it holds a int where an object mu"):
        files.known_identity()


@pytest.mark.parametrize(("equal", "status"), [(True, 0), (False, 3)])
def test_the_exit_status_of_verify(equal: bool, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported.json").touch()
    monkeypatch.setattr("megadpo.commands.verify.verify", lambda *_, **__: equal)
    assert convert.main(["verify", "--hf", "x", "--checkpoint", str(tmp_path)]) == status


def test_a_place_that_cannot_be_written_to_is_named(
    files: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert convert.main(["import", "--hf", str(files[0]), "--out", str(tmp_path / "file" / "out")]) == 2
    said = f"{tmp_path / 'file' / '.out.partial'}: can't be written (Not a directory): make room, or choose another"
    assert said in capsys.readouterr().err


def test_a_directory_that_holds_something_is_not_written_to(
    files: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious").touch()
    assert convert.main(["import", "--hf", str(files[0]), "--out", str(tmp_path)]) == 2
    assert f"--out={tmp_path}: must not exist, or be an empty directory" in capsys.readouterr().err
    assert convert.main(["export", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "new")]) == 2
    assert "holds no complete checkpoint" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_how_many_pairs_to_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "imported.json").touch()
    words = ["verify", "--hf", "x", "--checkpoint", str(tmp_path)]
    assert convert.main([*words, "--max-pairs", "3"]) == 2
    assert "--max-pairs=3: has no effect without --pairs" in capsys.readouterr().err
    assert convert.main([*words, "--pairs", "x", "--max-pairs", "0"]) == 2
    assert "--max-pairs=0: must be 1 or more" in capsys.readouterr().err


def test_an_unsupported_format_asks_for_a_choice(
    files: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = json.loads((files[0] / "config.json").read_text())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({**fields, "dtype": "float16"}))
    assert convert.main(["import", "--hf", str(tmp_path / "model"), "--out", str(tmp_path / "out")]) == 2
    assert 'dtype = "float16": must be bfloat16 or float32 to be kept: choose' in capsys.readouterr().err


def test_processes_share_the_layers_evenly(files: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    arch = read_architecture(files[0])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"--nproc-per-node=3: must divide the model's 4 layers, .* one of 1, 2, 4"):
        stages(arch)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert stages(arch) == 2
