"""The world of a launch: device, process groups, and one configuration that all ranks agree on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megadpo.config.compose import config_from_yaml, config_to_yaml
from megadpo.config.schema import Config
from megadpo.models.hf_config import Architecture, read_architecture
from megadpo.runtime.collectives import check_all_agree, on_main
from megadpo.runtime.device import Device, megatron_device, select_device
from megadpo.runtime.parallel_state import ParallelState, build_parallel_state, distributed
from megadpo.runtime.rank_logging import get_logger
from megadpo.setup.backend import settle_backend
from megadpo.setup.model_source import ModelSource, model_source
from megadpo.setup.program import described_program

logger = get_logger(__name__)

# How long a rank of a tool without a configuration waits in a collective for peers that may be loading or writing.
_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True)
class Session:
    """The world that every rank of a launch works in, and the models that its configuration names.

    `source` is where the policy's starting weights are. The reference's source and architecture are the policy's where
    reference.hf_path is null.
    """

    config: Config
    state: ParallelState
    device: Device
    source: ModelSource
    arch: Architecture
    reference_source: ModelSource
    reference_arch: Architecture


@contextmanager
def open_session(config: Config, resolve: Callable[[Config], Config]) -> Iterator[Session]:
    """Device and groups of a validated configuration for the duration of the context, on all ranks of the launch.

    `resolve` fills in on rank 0, for all ranks, what depends on clock and disk. The kind of the layers is settled there
    too, by what rank 0's machine has. ConfigError on every rank where one runs another program, or was started with
    another configuration; an error that `resolve` raises is raised on every rank too.
    """
    device = select_device(str(config.device.kind))
    with megatron_device(device), distributed(device, timeout_s=_group_timeout_s(config)):
        check_all_agree("program (megadpo's files, or versions of what it stands on)", described_program())
        check_all_agree("configuration", config_to_yaml(config))
        config = config_from_yaml(on_main(lambda: config_to_yaml(settle_backend(resolve(config), device))))
        source, own = model_source(config.model), config.reference.hf_path
        arch = read_architecture(source.hf_dir)
        yield Session(
            config,
            _build_state(config, device),
            device,
            source,
            arch,
            reference_source=source if own is None else ModelSource(Path(own), checkpoint=None),
            reference_arch=arch if own is None else read_architecture(own),
        )


@contextmanager
def open_world(device_kind: str) -> Iterator[Device]:
    """Device and default group of the launch for the duration of the context, for work without a configuration."""
    device = select_device(device_kind)
    with megatron_device(device), distributed(device, timeout_s=_TIMEOUT_S):
        yield device


def build_pipeline(stages: int) -> ParallelState:
    """The launch's ranks as so many pipeline stages."""
    return build_parallel_state(tensor=1, pipeline=stages, virtual_pipeline=None, seed=0, timeout_s=_TIMEOUT_S)


def _group_timeout_s(config: Config) -> float:
    """Time-out of a process group in seconds, longer than a rank may stand still.

    A run that hangs must be ended by the watchdog, which can say where it hangs.
    """
    return 1.25 * config.parallel.timeout_s + 60.0


def _build_state(config: Config, device: Device) -> ParallelState:
    state = build_parallel_state(
        tensor=config.parallel.tensor,
        pipeline=config.parallel.pipeline,
        virtual_pipeline=config.parallel.virtual_pipeline,
        seed=config.train.seed,
        timeout_s=_group_timeout_s(config),
    )
    virtual = f" x {state.virtual_pipeline_size} chunks" if state.virtual_pipeline_size > 1 else ""
    logger.info(
        "%d ranks on %s: tensor %d, pipeline %d%s, data %d",
        state.tensor_size * state.pipeline_size * state.data_size,
        device.kind,
        state.tensor_size,
        state.pipeline_size,
        virtual,
        state.data_size,
    )
    return state
