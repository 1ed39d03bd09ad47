"""Trackers that write metrics: JSON lines, TensorBoard, Weights & Biases. Only global rank 0 has trackers.

A tracker that fails is reported and never stops the run: a full disk or a lost connection costs lines of metrics, not
the training. Weights & Biases gets the metrics and the configuration; its own collection of data on the machine, the
command line and the console is switched off, since any of it may contain a password.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from megadpo.errors import ConfigError, MegaDPOError
from megadpo.runtime.files import write_durably
from megadpo.runtime.rank_logging import get_logger

logger = get_logger(__name__)

# Default of the seconds that Weights & Biases may go on uploading after the run.
_WANDB_FINISH_TIMEOUT_S = 300.0


class Tracker(Protocol):
    """A destination of metrics."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one step's metrics."""
        ...

    def close(self, *, failed: bool) -> None:
        """Flushes and closes files; `failed`: the run ends with an error."""
        ...


@contextmanager
def open_trackers(
    names: Sequence[str], run_dir: Path, *, resume_step: int, settings: Mapping[str, Any]
) -> Iterator[list[Tracker]]:
    """Opens the named trackers of a run that continues from `resume_step` (0: a fresh start); closes them at the end.

    `settings` is the run's configuration as plain values, for the trackers that show it. An error in a tracker is
    logged as a warning and only costs that tracker's lines.
    """
    openers: dict[str, Callable[[], Tracker]] = {
        "jsonl": lambda: JsonlTracker(run_dir / "metrics.jsonl", resume_step=resume_step),
        "tensorboard": lambda: TensorBoardTracker(run_dir / "tensorboard", resume_step=resume_step),
        "wandb": lambda: WandbTracker(run_dir, resume_step=resume_step, settings=settings),
    }
    with ExitStack() as stack:
        yield [stack.enter_context(GuardedTracker(name, openers[name])) for name in names]


class GuardedTracker:
    """A tracker whose errors become warnings: each distinct one is logged once, the number of lost lines at the end."""

    def __init__(self, name: str, open_tracker: Callable[[], Tracker]) -> None:
        self._name = name
        self._open = open_tracker
        self._tracker: Tracker | None = None
        self._reported: set[str] = set()
        self._lines = 0
        self._lost = 0

    def __enter__(self) -> GuardedTracker:
        try:
            self._tracker = self._open()
        except Exception as error:
            self._warn(error, "the run goes on without it")
        return self

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Forwards one step's metrics, or counts them as lost."""
        self._lines += 1
        if self._tracker is None:
            self._lost += 1
            return
        try:
            self._tracker.log(step, metrics)
        except Exception as error:
            self._lost += 1
            self._warn(error, f"the metrics of step {step} are lost there; the run goes on")

    def close(self, *, failed: bool) -> None:
        """Closes the tracker and logs how many lines were lost."""
        try:
            if self._tracker is not None:
                self._tracker.close(failed=failed)
        except Exception as error:
            self._warn(error, "the last metrics may be missing there")
        if self._lost:
            logger.warning("tracker %s: %d of %d lines of metrics are lost", self._name, self._lost, self._lines)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def _warn(self, error: Exception, consequence: str) -> None:
        text = str(error) if isinstance(error, MegaDPOError) else f"{type(error).__name__}: {error}"
        if text not in self._reported:
            self._reported.add(text)
            logger.warning("tracker %s failed: %s (%s)", self._name, text, consequence)


class JsonlTracker:
    """Writes `metrics.jsonl`, one flushed object per logged step.

    For a run that continues from `resume_step` (0: a fresh start), it first drops the lines after that step and an
    incomplete last line, so that the file reads as if the run had never been interrupted.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        kept = lines_up_to(path, resume_step) if resume_step > 0 and path.exists() else ()
        write_durably(path, "".join(text for text, _ in kept))
        self._file = path.open("ab", buffering=0)  # a buffer would write a failed line later, or a part of it

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line, `step` first; a number that is not finite becomes null, since JSON has no NaN.

        Raises OSError if the whole line can't be written; then nothing of it is left in the file.
        """
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        rest = memoryview((json.dumps({"step": step, **finite}) + "\n").encode())
        end = os.fstat(self._file.fileno()).st_size
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(end)
            raise

    def close(self, *, failed: bool) -> None:
        """Closes the file."""
        self._file.close()


def lines_up_to(path: Path, last_step: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines of a metrics file up to step `last_step`, each as its text and its parsed values.

    Lines that a killed process left incomplete, or that have no step, are skipped.
    """
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int) and line["step"] <= last_step:
            yield text + "\n", line


class TensorBoardTracker:
    """Writes event files under `tensorboard/`, a scalar per metric; hides events after `resume_step` (0: all)."""

    def __init__(self, directory: Path, *, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=resume_step + 1 if resume_step else 0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the scalars of one step."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        """Closes the event file."""
        self._writer.close()


class WandbTracker:
    """Logs to a Weights & Biases run, one row per step; its environment variables (WANDB_MODE, ...) have their effect.

    A run and its continuations are one W&B run: `RUN_DIR/wandb/resume.json` keeps its id and the last step whose row is
    complete. W&B only accepts increasing steps, so a resumed run adds rows after that step, and rows logged between the
    checkpoint and the interruption stay as they are. An evaluation that a stopped run left to the resumed run is too
    late for its own row and joins the next one; `resume.json` keeps it until then.
    """

    def __init__(self, run_dir: Path, *, resume_step: int, settings: Mapping[str, Any]) -> None:
        import wandb

        self._state = run_dir / "wandb" / "resume.json"
        self._state.parent.mkdir(parents=True, exist_ok=True)
        # Without its informational messages W&B never asks for a key on the terminal; its warnings stay.
        own = wandb.setup(settings=wandb.Settings(show_info=False)).settings
        known = _read_state(self._state)
        if own.run_id and own.run_id != known.get("id", own.run_id):
            logger.warning(
                "WANDB_RUN_ID=%s has no effect: this run goes on in its own W&B run %s; remove %s to leave that one",
                own.run_id,
                known["id"],
                self._state,
            )
        try:
            self._run = wandb.init(
                project=own.project or "megadpo",
                name=own.run_name or run_dir.name,
                id=known.get("id") or own.run_id or uuid.uuid4().hex[:8],
                dir=os.environ.get("WANDB_DIR") or run_dir,
                resume="allow",
                config=dict(settings),
                settings=_privacy_settings(finish_timeout=own.finish_timeout or _WANDB_FINISH_TIMEOUT_S),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"trackers=wandb: {error}: log in once with `wandb login` (or set WANDB_API_KEY), or set "
                "WANDB_MODE=offline and upload the run later with `wandb sync`"
            ) from error
        self._resumed = resume_step
        self._late: dict[str, float] = known.get("late", {})
        self._done = self._latest = max(known.get("step", -1), self._run.starting_step - 1)
        self._remember(self._done)
        logger.info("W&B run %s: %s", self._run.id, self._run.dir if self._run.offline else self._run.url)
        if self._done > resume_step:
            logger.info("W&B keeps what it was given of steps %d to %d before", resume_step + 1, self._done)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds metrics to the row of `step`; an evaluation joins the row of the update that it follows."""
        if step <= self._done:
            if step == self._resumed > 0:  # W&B has all other metrics up to this step already
                self._late |= metrics
                self._remember(self._done)
                logger.info("W&B has closed the row of step %d: its evaluation joins the next row", step)
            return
        if step > self._latest > self._done:
            self._late = {}  # the row that it joined is complete
        late = self._late if step > self._latest else {}  # once per row, or it would replace metrics logged after it
        self._run.log({**late, **metrics}, step=step)
        if step > self._latest:
            self._remember(self._latest)
            self._latest = step

    def close(self, *, failed: bool) -> None:
        """Uploads what is left and ends the W&B run, as failed (exit code 1) or finished, and W&B's own process."""
        import wandb

        if self._latest > self._done:
            self._late = {}
        self._remember(self._latest)
        try:
            self._run.finish(exit_code=int(failed))
        finally:
            wandb.teardown()  # its files are complete when that process is gone

    def _remember(self, step: int) -> None:
        """Stores the last step whose row is complete, and the metrics that wait for the next row."""
        late = {"late": self._late} if self._late else {}
        write_durably(self._state, json.dumps({"id": self._run.id, "step": step, **late}) + "\n")


def _read_state(path: Path) -> dict[str, Any]:
    """Reads `resume.json`: W&B id, last complete step, late metrics; {} for a new run."""
    if not path.exists():
        return {}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return {"id": str(state["id"]), "step": int(state["step"]), "late": dict(state.get("late", {}))}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise MegaDPOError(f"{path} can't be read ({error!r}): remove it, and a new W&B run begins") from error


def _privacy_settings(*, finish_timeout: float) -> Any:
    """Settings with which W&B collects nothing that could contain a secret, and ends in bounded time."""
    import wandb

    return wandb.Settings(
        console="off",
        save_code=False,
        disable_code=True,
        disable_git=True,  # git remotes may hold a password, and a diff whatever lies around
        disable_job_creation=True,
        x_disable_meta=True,  # command line, user, paths
        x_disable_machine_info=True,
        x_save_requirements=False,  # packages installed from a URL are listed with it
        symlink=False,  # a copied run directory would hold the last W&B directory twice
        finish_timeout=finish_timeout,
        finish_timeout_raises=True,
    )
