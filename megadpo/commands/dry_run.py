"""A launch rehearsed up to its weights: settings, groups, data, the first steps' schedule, and then the plan."""

from __future__ import annotations

import os

from rich.console import Console

from megadpo.commands.plan import attention_of_cards, data_lengths, job_of
from megadpo.commands.train import begin, count_steps
from megadpo.config.schema import Config
from megadpo.errors import ConfigError
from megadpo.models.hf_config import read_architecture
from megadpo.planner import Job, make_plan
from megadpo.planner.report import print_plan
from megadpo.runtime.collectives import check_all_agree
from megadpo.runtime.rank_logging import get_logger
from megadpo.setup.datasets import load_datasets, warn_long_sequences
from megadpo.setup.model_source import model_source
from megadpo.setup.options import announce
from megadpo.setup.session import Session, open_session

logger = get_logger(__name__)


def run_dry(config: Config) -> None:
    """Prints on rank 0 what the launch's layout takes for the run's data; reads no weights, and writes tokens only.

    Collective over all ranks of the launch. Raises what a training would up to there, and on rank 0 ConfigError where
    the layout does not fit the cards that are known.
    """
    with open_session(config, begin) as session:
        job = _prepare(session)
    # The plan imagines a world of its own, for which the launch's must be gone.
    if not session.state.is_main:
        return
    logger.info("the tokens stay in %s, where a run with this data.cache_dir finds them", session.config.data.cache_dir)
    plan = make_plan(job)
    print_plan(plan, Console())
    if not plan.fits:
        raise ConfigError(plan.refusal())


def _prepare(session: Session) -> Job:
    """The launch's job, after everything that a training does before it reads weights."""
    config, state, device = session.config, session.state, session.device
    source = model_source(config.model)
    arch = read_architecture(source.hf_dir)
    announce(config, arch, device, trains=True)
    datasets = load_datasets(config, source.hf_dir, arch.vocab_size)
    warn_long_sequences(datasets, arch.max_position_embeddings)
    check_all_agree("data or model configuration", f"{datasets.digests} {arch}")
    count_steps(config, len(datasets.train))
    lengths = data_lengths(datasets.train, config)
    own = config.reference.hf_path
    gpu = config.cluster.gpu or device.gpu_name()
    on_cards = device.kind == "cuda" or gpu is not None
    return job_of(
        config,
        arch,
        arch if own is None else read_architecture(own),
        world_size=state.tensor_size * state.pipeline_size * state.data_size,
        gpu=gpu,
        memory_gib=device.memory_gib(),
        gpus_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or None,
        steps=lengths.steps,
        longest_pair=lengths.longest_pair,
        attention=attention_of_cards(config) if on_cards else "sdpa",
    )
