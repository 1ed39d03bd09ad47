"""The dry run: a launch rehearsed up to its weights, with settings, groups, data and schedule, and then its plan."""

from __future__ import annotations

import os

from rich.console import Console

from megadpo.commands.plan import attention_on_gpus, data_lengths, job_of
from megadpo.config.schema import Config
from megadpo.errors import ConfigError
from megadpo.planner import Job, make_plan
from megadpo.planner.report import print_plan
from megadpo.runtime.rank_logging import get_logger
from megadpo.setup.datasets import load_datasets
from megadpo.setup.options import check_and_log_options
from megadpo.setup.run_directory import begin
from megadpo.setup.session import Session, open_session
from megadpo.setup.trainer import count_steps

logger = get_logger(__name__)


def run_dry(config: Config) -> None:
    """Prints on rank 0 the plan of the launch's layout for the run's data; reads no weights, and writes tokens only.

    Collective over all ranks of the launch. Raises what a training would up to there, and on rank 0 ConfigError where
    the layout does not fit the GPUs that are known.
    """
    with open_session(config, begin) as session:
        job = _rehearse(session)
    # The plan imagines a world of its own, for which the launch's must be gone.
    if not session.state.is_main:
        return
    logger.info("the tokens stay in %s, where a run with this data.cache_dir finds them", session.config.data.cache_dir)
    plan = make_plan(job)
    print_plan(plan, Console())
    if not plan.fits:
        raise ConfigError(plan.refusal())


def _rehearse(session: Session) -> Job:
    """The launch's job, after everything that a training does before it reads weights.

    Their files are not looked at: a plan must be possible where only the model's config.json and tokenizer are.
    """
    config, state, device = session.config, session.state, session.device
    check_and_log_options(session, trains=True)
    datasets = load_datasets(session)
    count_steps(config, len(datasets.train))
    lengths = data_lengths(datasets.train, config)
    gpu = config.cluster.gpu or device.gpu_name()
    on_gpus = device.kind == "cuda" or gpu is not None
    return job_of(
        config,
        session.arch,
        session.reference_arch,
        world_size=state.tensor_size * state.pipeline_size * state.data_size,
        gpu=gpu,
        memory_gib=device.memory_gib(),
        gpus_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or None,
        steps=lengths.steps,
        longest_pair=lengths.longest_pair,
        attention=attention_on_gpus(config) if on_gpus else "sdpa",
    )
