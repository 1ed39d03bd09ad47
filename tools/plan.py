#!/usr/bin/env python3
"""Says what a layout takes before anything is started: memory of every rank, the bubble, traffic, the time of a step.

    python tools/plan.py +model=llama70b cluster.gpus=64 cluster.gpu=h100 key=value ... [--suggest]

Needs no GPU, no weights and no data. --suggest plans every layout of the model on these cards and ranks those that fit.
The exit status is 2 where the layout does not fit. Keys are those of training (megadpo/config/schema.py), and:
    cluster.gpus=N cluster.gpu=NAME        how many cards of which kind (megadpo/runtime/gpus.py lists them)
    cluster.memory_gib=GIB                 memory of a card, if it is another, or not all of it is to be used
    plan.prompt_tokens=N plan.response_tokens=N     what pairs are assumed to be like; data.train_path=F reads real ones
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone's package, whatever is installed

from megadpo.commands.command_line import check_plan, run_tool
from megadpo.config.compose import compose_config, resolve_defaults
from megadpo.config.schema import Config
from megadpo.errors import ConfigError
from megadpo.setup.model_source import resolve_model

CONFIG_DIR = Path(__file__).resolve().parents[1] / "conf"
_SUGGEST = "--suggest"
# Keys that it decides.
_SUGGESTED = (
    *("parallel.tensor=", "parallel.pipeline=", "parallel.virtual_pipeline=", "parallel.sequence_parallel="),
    *("parallel.num_layers_in_", "model.recompute_"),
)
_SHOWN = 10
# Width of tables without a terminal, as in the documentation.
_WIDTH = 120


def main(arguments: list[str]) -> int:
    """Prints the plan of the command line; returns the exit status (0 fits, 2 refused or does not fit)."""
    if any(word in ("-h", "--help") for word in arguments):
        print(__doc__)
        return 0

    def plan(logger: logging.Logger) -> int:
        suggesting = _SUGGEST in arguments
        words = _without_layout(arguments) if suggesting else arguments
        config = compose_config(words, config_dir=CONFIG_DIR, check=check_plan, dispensable={"data.train_path": []})
        console = Console(width=None if sys.stdout.isatty() else _WIDTH)
        with TemporaryDirectory(prefix="megadpo-tokens-") as scratch:
            # Without a named cache, no files are left behind.
            cached = replace(config, data=replace(config.data, cache_dir=config.data.cache_dir or scratch))
            show(resolve_defaults(resolve_model(cached), datetime.now()), console, suggesting=suggesting)
        return 0

    return run_tool("plan", plan)


def _without_layout(arguments: list[str]) -> list[str]:
    """Checks the words for --suggest, which tries all layouts. Raises ConfigError if they name one."""
    words = [word for word in arguments if word != _SUGGEST]
    inert = [word for word in words if word.lstrip("+").startswith(_SUGGESTED)]
    if inert:
        raise ConfigError(
            [f"{word}: has no effect with {_SUGGEST}, which tries all: drop one of the two" for word in inert]
        )
    # A named model's own layout need not suit the number of cards.
    return [*words, "parallel.tensor=1", "parallel.pipeline=1"]


def show(config: Config, console: Console, *, suggesting: bool) -> None:
    """Prints a resolved configuration's plan, or the layouts that fit. Raises ConfigError if none does."""
    # These take seconds to import; mistakes in the words cost none.
    from megadpo.commands.plan import planned_job
    from megadpo.planner import make_plan
    from megadpo.planner.report import print_plan, print_ranking
    from megadpo.planner.suggest import RECOMPUTES, suggest
    from megadpo.runtime.progress import ProgressBar

    job = planned_job(config)
    if not suggesting:
        plan = make_plan(job)
        print_plan(plan, console)
        if not plan.fits:
            raise ConfigError(plan.refusal())
        return
    with ProgressBar("planning layouts", total=100, visible=True) as bar:

        def report(done: int, total: int) -> None:
            bar.update(100 * done // total, f"{done} of {total} layouts")

        ranking = suggest(job, RECOMPUTES, report=report)
    if not ranking.plans:
        raise ConfigError(
            f"cluster.gpus={config.cluster.gpus}: none of the {ranking.looked_at} layouts fits: take more cards, cards "
            "with more memory, or lower data.tokens_per_microbatch"
        )
    print_ranking(ranking, job, console, most=_SHOWN)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
