"""Jobs for the planner: of tools/plan.py's configuration, for which no file need exist, and of a dry run's launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice

import numpy as np

from megadpo.config.choices import AttentionKernel, Dtype, Fp8Backend
from megadpo.config.schema import Config
from megadpo.data.loader import epoch_order
from megadpo.data.store import PairView
from megadpo.errors import ConfigError
from megadpo.models.fp8 import unaligned_features, why_not_gpu
from megadpo.models.hf_config import Architecture, parse_architecture, read_architecture
from megadpo.planner import Cluster, Job, Layout, MemoryKnobs, PairLengths
from megadpo.runtime.gpus import GPUS
from megadpo.setup.datasets import open_datasets, prepare_stores
from megadpo.setup.model_source import model_source
from megadpo.setup.options import optimizer_options, pipeline_split, recomputation, torch_dtype

# Steps of the data whose schedules are looked at.
_STEPS = 50
_GPUS_OF_A_MACHINE = 8


@dataclass(frozen=True, slots=True)
class DataLengths:
    """The pairs of the first steps, and the longest stream that a pair of the whole set makes."""

    steps: tuple[tuple[PairLengths, ...], ...]
    longest_pair: int


def data_lengths(pairs: PairView, config: Config) -> DataLengths:
    """Lengths of the first epoch's first steps, in the order that training takes them."""
    size = config.train.global_batch_size
    order = epoch_order(len(pairs), seed=config.train.seed, epoch=0, shuffle=config.train.shuffle)
    columns = (pairs.prompt_lengths, pairs.chosen_lengths, pairs.rejected_lengths)
    most = _STEPS if config.train.max_steps is None else min(_STEPS, config.train.max_steps)
    steps = [
        tuple(PairLengths(*map(int, lengths)) for lengths in np.stack([column[part] for column in columns], axis=1))
        for part in islice((order[start : start + size] for start in range(0, len(pairs), size)), most)
    ]
    return DataLengths(tuple(steps), int(pairs.stream_lengths(share_prompt=config.data.share_prompt).max()))


def planned_job(config: Config) -> Job:
    """The job of a checked and resolved configuration for tools/plan.py; reads data where they are named."""
    arch = _architecture(config)
    own = config.reference.hf_path
    reference = arch if own is None else read_architecture(own)
    _check_fp8(config, (arch, reference))
    lengths = _read_lengths(config, arch) if config.data.train_path else None
    return job_of(
        config,
        arch,
        reference,
        world_size=int(config.cluster.gpus or 0),
        gpu=config.cluster.gpu,
        steps=None if lengths is None else lengths.steps,
        longest_pair=0 if lengths is None else lengths.longest_pair,
        attention=attention_on_gpus(config),
    )


def job_of(
    config: Config,
    arch: Architecture,
    reference: Architecture,
    *,
    world_size: int,
    gpu: str | None,
    memory_gib: float | None = None,
    gpus_per_node: int | None = None,
    steps: Sequence[Sequence[PairLengths]] | None = None,
    longest_pair: int = 0,
    attention: str = "varlen",
) -> Job:
    """The job that a configuration describes on `world_size` ranks of the GPU `gpu` (a name of the table, or null).

    Without `steps`, those of real data, the lengths are assumed: `plan.prompt_tokens` and `plan.response_tokens`, by
    default each a quarter of data.max_length. `memory_gib` of a GPU and `gpus_per_node` are a launch's; settings win
    over them.
    """
    parallel, data, cluster, precision = config.parallel, config.data, config.cluster, config.precision
    known = None if gpu is None else GPUS.get(gpu)
    lengths_from = "the data"
    if steps is None:
        pair = _assumed_pair(config)
        steps = [[pair] * config.train.global_batch_size]
        lengths_from = f"assumed: prompts of {pair.prompt}, responses of {pair.chosen} tokens"
    recipe = None if precision.fp8 is None else str(precision.fp8)
    return Job(
        name=config.model.name,
        arch=arch,
        reference=reference,
        layout=Layout(
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            virtual_pipeline=parallel.virtual_pipeline or 1,
            data=world_size // (parallel.tensor * parallel.pipeline),
            sequence_parallel=parallel.uses_sequence_parallelism(),
            split=pipeline_split(config),
        ),
        knobs=MemoryKnobs(
            recompute=recomputation(config),
            optimizer=optimizer_options(config),
            grad_reduce_in_fp32=parallel.grad_reduce_in_fp32,
            fp8=recipe if precision.fp8_backend == Fp8Backend.transformer_engine else None,
            layers_in_bf16=(precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16),
            padded_for=recipe,
            reference=str(config.reference.mode),
        ),
        cluster=Cluster(
            gpu_name=gpu,
            gpu=known,
            memory_gib=cluster.memory_gib or memory_gib or (known.memory_gib if known else None),
            gpus_per_node=cluster.gpus_per_node or gpus_per_node or _GPUS_OF_A_MACHINE,
            network_gb_per_s=cluster.network_gb_per_s or (known.network_gb_per_s if known else None),
        ),
        dtype=torch_dtype(config),
        steps=tuple(tuple(step) for step in steps),
        longest_pair=longest_pair,
        lengths_from=lengths_from,
        share_prompt=data.share_prompt,
        tokens_per_microbatch=data.tokens_per_microbatch,
        logits_mib=config.model.logits_mib,
        attention=attention,
    )


def attention_on_gpus(config: Config) -> str:
    """The kernel that a model is planned with for GPUs: varlen where this torch has it and the format allows."""
    if config.device.attention == AttentionKernel.sdpa:
        return "sdpa"
    has_kernel = find_spec("torch.nn.attention.varlen") is not None
    return "varlen" if has_kernel and config.precision.dtype == Dtype.bf16 else "sdpa"


def _check_fp8(config: Config, models: Sequence[Architecture]) -> None:
    """Raises ConfigError where the planned GPU or the models' sizes don't take the FP8 recipe."""
    recipe = config.precision.fp8
    if recipe is None or config.precision.fp8_backend == Fp8Backend.emulate:
        return
    gpu = GPUS.get(str(config.cluster.gpu))
    found = (
        None if gpu is None else why_not_gpu(str(recipe), gpu.compute_capability),
        *(unaligned_features(arch, str(recipe), tensor=config.parallel.tensor) for arch in models),
    )
    problems = [
        f"precision.fp8={recipe}: {problem}: use another recipe or layout"
        for problem in dict.fromkeys(found)
        if problem
    ]
    if problems:
        raise ConfigError(problems)


def _architecture(config: Config) -> Architecture:
    if config.model.hf_path is None and config.model.checkpoint is None:
        assert config.model.shape is not None
        return parse_architecture(config.model.shape, source="model.shape")
    return read_architecture(model_source(config.model).hf_dir)


def _read_lengths(config: Config, arch: Architecture) -> DataLengths:
    tokenizer_dir = model_source(config.model).hf_dir
    prepared = prepare_stores(config, tokenizer_dir)
    return data_lengths(open_datasets(config, prepared, tokenizer_dir, arch.vocab_size).train, config)


def _assumed_pair(config: Config) -> PairLengths:
    quarter = max(1, config.data.max_length // 4)
    response = config.plan.response_tokens or quarter
    return PairLengths(config.plan.prompt_tokens or quarter, response, response)
