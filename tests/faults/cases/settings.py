"""Bad settings and run directories, refused."""

from __future__ import annotations

from pathlib import Path

from tests.faults.cases.case import Base, Case


def _file(here: Path, _: Base) -> None:
    (here / "file").write_text("")


def _notes(here: Path, _: Base) -> None:
    (here / "used").mkdir()
    (here / "used" / "notes.txt").write_text("")


def _blocked(here: Path, _: Base) -> None:
    (here / "run" / ".config.yaml").mkdir(parents=True)
    (here / "run" / "config.yaml").write_text("")


CASES = [
    Case("unknown key", ("data.train_pth=x",), r"data\.train_pth=x: unknown key; did you mean data\.train_path\?"),
    Case("unknown group", ("dta.train_path=x",), r"dta\.train_path=x: unknown key; did you mean data\.train_path\?"),
    Case("text for a number", ("optimizer.lr=abc",), r"optimizer\.lr=abc: must be a number, as in optimizer\.lr=1e-06"),
    Case("out of range", ("loss.beta=-1",), r"loss\.beta=-1\.0: must be a finite number > 0"),
    Case("unknown choice", ("loss.name=dpo",), r"loss\.name=dpo: must be one of sigmoid, .*, as in loss\.name=\[sigmo"),
    Case(
        "unknown model", ("+model=llama3_9b",), r"model=llama3_9b: no such model: did you mean model=llama3_8b\? one "
    ),
    Case("option", ("--lr=1",), r"--lr=1: options are not known here: set keys with key=value"),
    Case("no value", ("optimizer.lr",), r"optimizer\.lr: must be key=value or \+group=file; quote special characters"),
    Case(
        "all at once",
        ("optimizer.lr=abc", "loss.beta=-1", "train.epoch=2", "model.hf_path=HERE/none", "parallel.tensor=3"),
        r"5 problems in the configuration:\n  1\. optimizer\.lr=abc.*train\.epoch=2.*beta=-1.*hf_path=.*tensor=3.*",
    ),
    Case(
        "knob without effect",
        ("loss.ipo_length_normalize=false",),
        r"loss\.ipo_length_normalize=false: has no effect with loss\.name=sigmoid: leave it at true, or use loss\.n",
    ),
    Case(
        "column twice",
        ("data.chosen_key=prompt",),
        r"data\.prompt_key=prompt, data\.chosen_key=prompt, .*: must be three different fields: name the ones your rec",
    ),
    Case(
        "day", ("data.template_date=today",), r"data\.template_date=today: must be a day, as in data\.template_date=2"
    ),
    Case(
        "ranks that disagree",
        ("train.seed=RANK",),
        r"ranks \[1\] see another configuration than rank 0\. Start every rank with the same command line",
    ),
    Case(
        "warm-up longer than the run",
        ("train.max_steps=null", "optimizer.warmup_steps=100"),
        r"optimizer\.warmup_steps=100: must be below the run's \d steps: shorten the warm-up or train longer",
    ),
    # Run directories; file modes mean nothing to the superuser, a file in the path stops everyone.
    Case(
        "run directory that is a file",
        ("train.run_dir=HERE/file",),
        r"train\.run_dir=HERE/file: must be a directory, it is a file: choose another path",
        _file,
    ),
    Case(
        "run directory that can't be made",
        ("train.run_dir=HERE/file/run",),
        r"train\.run_dir=HERE/file/run: must be a directory that can be made .* \(Not a directory\): choose another",
        _file,
    ),
    Case(
        "cache that can't be written",
        ("data.cache_dir=HERE/file/cache",),
        r"data\.cache_dir=HERE/file/cache: can't be written \(Not a directory\): make room, or choose another",
        _file,
    ),
    Case(
        "run directory in use",
        ("train.run_dir=HERE/used",),
        r"train\.run_dir=HERE/used: must be empty with train\.resume=never: continue .* or choose another directory",
        _notes,
    ),
    Case(
        "run directory of something else",
        ("train.run_dir=HERE/used", "train.resume=auto"),
        r"train\.run_dir=HERE/used: holds files but no config\.yaml, so it is not .* of a run: choose another",
        _notes,
    ),
    Case(
        "run directory that can't be written to",
        ("train.run_dir=HERE/run", "train.resume=auto"),
        r"HERE/run/\.config\.yaml: can't be written \(Is a directory\): make room, or choose another directory",
        _blocked,
        reads_weights=True,
    ),
    Case(
        "nothing to resume",
        ("train.resume=HERE",),
        r"train\.resume=HERE: HERE holds no complete checkpoint .*: give the directory of a run or of one of its steps",
    ),
]
