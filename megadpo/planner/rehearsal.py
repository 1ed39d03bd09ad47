"""Measures the memory of a model chunk by running its real forward and backward on meta tensors.

The code is that of the training, so that the plan follows every change of what a module saves. Chunks of one and of two
layers are run; every further layer adds the difference of the two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel.schedules import custom_backward, deallocate_output_tensor

from megadpo.data.batch import PreferenceBatch, build_batch, stream_tokens
from megadpo.data.tokenization import TokenizedPair
from megadpo.models.builder import build_model
from megadpo.models.hf_config import Architecture
from megadpo.models.options import PipelineSplit, Recompute
from megadpo.optimizer.build import wrap_data_parallel
from megadpo.planner.job import Job, PairLengths
from megadpo.planner.meter import LiveBytes
from megadpo.planner.shards import model_options
from megadpo.runtime.parallel_state import simulated_parallel_state


@dataclass(frozen=True, slots=True)
class StagePosition:
    """A chunk's position in the pipeline: `embeds` if it has the embedding, `scores` if it has the head."""

    embeds: bool
    scores: bool


@dataclass(frozen=True, slots=True)
class Stream:
    """A microbatch of as many pairs with the same lengths as fit into `tokens`, and padding."""

    tokens: int
    pair: PairLengths
    share_prompt: bool

    def batch(self) -> PreferenceBatch:
        """The microbatch, with zeros as tokens."""
        pair = self.pair
        length = stream_tokens(pair.prompt, pair.chosen, pair.rejected, share_prompt=self.share_prompt)
        blank = np.zeros(max(pair.prompt, pair.chosen, pair.rejected), np.int32)
        tokens = TokenizedPair(0, blank[: pair.prompt], blank[: pair.chosen], blank[: pair.rejected])
        pairs = [tokens] * max(1, self.tokens // length)
        return build_batch(pairs, num_tokens=self.tokens, pad_token_id=0, share_prompt=self.share_prompt)


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one microbatch in one chunk, in addition to weights and gradients.

    `saved` is kept from the forward to the backward; `forward_peak` and `backward_peak` are the peaks of the two, with
    what this microbatch has saved; `scoring_peak` is that of a forward without gradients. `workspace` stays allocated
    after its first use, and is in none of the others.
    """

    saved: int
    forward_peak: int
    backward_peak: int
    scoring_peak: int
    workspace: int

    def plus(self, other: Footprint, times: int) -> Footprint:
        """Adds `times` further layers, each as large as the difference to `other`; the workspace is shared."""
        return Footprint(
            saved=self.saved + times * (other.saved - self.saved),
            forward_peak=self.forward_peak + times * (other.forward_peak - self.forward_peak),
            backward_peak=self.backward_peak + times * (other.backward_peak - self.backward_peak),
            scoring_peak=max(self.scoring_peak, other.scoring_peak),
            workspace=max(self.workspace, other.workspace),
        )

    def less(self, saved: int) -> Footprint:
        """Subtracts `saved` bytes from what is kept for the backward."""
        return replace(
            self,
            saved=self.saved - saved,
            forward_peak=self.forward_peak - saved,
            backward_peak=self.backward_peak - saved,
        )


class Rehearsals:
    """Footprints of chunks, each kind measured once; to be used inside `megatron_device(planning_device())`."""

    def __init__(self) -> None:
        self._known: dict[object, Footprint] = {}

    def chunk(self, job: Job, arch: Architecture, stream: Stream, position: StagePosition, layers: int) -> Footprint:
        """The footprint of a chunk of `layers` layers under the job's recomputation."""
        recompute = job.knobs.recompute
        if not recompute.is_block:
            return self._extrapolated(job, arch, stream, position, layers, recompute)
        # Block: `num_layers` layers save only their input, and the others everything.
        thrifty = min(_layers_per_group(recompute), layers)
        single = Recompute(granularity="full", method="uniform", num_layers=1)
        if thrifty == layers:
            return self._extrapolated(job, arch, stream, position, layers, single)
        rest = self._extrapolated(job, arch, stream, position, layers - thrifty, Recompute())
        one, two = (self._rehearsed(job, arch, stream, position, n, single) for n in (1, 2))
        return rest.less(-thrifty * (two.saved - one.saved))

    def _extrapolated(
        self, job: Job, arch: Architecture, stream: Stream, position: StagePosition, layers: int, recompute: Recompute
    ) -> Footprint:
        """Extrapolates from one and two groups of layers that are recomputed together to all `layers`."""
        group = min(_layers_per_group(recompute), layers) if recompute.granularity == "full" else 1
        one, two = (self._rehearsed(job, arch, stream, position, n * group, recompute) for n in (1, 2))
        return one.plus(two, times=-(-layers // group) - 1)

    def _rehearsed(
        self, job: Job, arch: Architecture, stream: Stream, position: StagePosition, layers: int, recompute: Recompute
    ) -> Footprint:
        layout = (job.layout.tensor, job.layout.sequence_parallel)
        key = (arch, layout, job.dtype, job.logits_mib, job.attention, stream, position, layers, recompute)
        if key not in self._known:
            self._known[key] = rehearse(job, arch, stream, position, layers, recompute)
        return self._known[key]


def _layers_per_group(recompute: Recompute) -> int:
    """The number of layers in a group of full recomputation."""
    assert recompute.num_layers is not None
    return recompute.num_layers


def rehearse(
    job: Job, arch: Architecture, stream: Stream, position: StagePosition, layers: int, recompute: Recompute
) -> Footprint:
    """Runs a chunk's forward, its backward, and a forward without gradients; returns its footprint."""
    stages = 1 if position.embeds and position.scores else 3
    stage = 0 if position.embeds else 2 if position.scores else 1
    batch = stream.batch()
    with (
        simulated_parallel_state(
            tensor=job.layout.tensor, pipeline=stages, virtual_pipeline=None, data=1, stage=stage
        ) as state,
        LiveBytes() as meter,
    ):
        with torch.device("meta"):
            model = replace(arch, num_layers=layers * stages)
            (chunk,) = build_model(model, state, model_options(job, recompute=recompute, split=PipelineSplit()))
            (wrapped,) = wrap_data_parallel([chunk])
        run = _Run(wrapped, batch, position=position, meter=meter)
        rows = stream.tokens // job.layout.sequence_ranks
        return run.footprint(rows=rows, hidden_size=arch.hidden_size, dtype=job.dtype)


class _Run:
    """The run of one chunk; the hidden states between chunks are [`rows`, 1, H]."""

    def __init__(
        self, chunk: DistributedDataParallel, batch: PreferenceBatch, *, position: StagePosition, meter: LiveBytes
    ) -> None:
        self.chunk, self.batch, self.position, self.meter = chunk, batch, position, meter

    def footprint(self, *, rows: int, hidden_size: int, dtype: torch.dtype) -> Footprint:
        """Measures the footprint; the chunk must not have been run before."""
        meter = self.meter
        start = meter.now
        meter.reset_peak()
        hidden = torch.empty(rows, 1, hidden_size, dtype=dtype, device="meta", requires_grad=True)
        output = self._forward(hidden)
        forward_peak = meter.peak
        if not self.position.scores:
            deallocate_output_tensor(output, True)
        saved = meter.now
        meter.reset_peak()
        if self.position.scores:
            output.sum().backward()
        else:
            custom_backward(output, torch.empty_like(hidden))
        backward_peak = meter.peak
        del output, hidden
        self.chunk.module.set_input_tensor([None])
        workspace = meter.now - start
        meter.reset_peak()
        with torch.no_grad():
            self._forward(torch.empty(rows, 1, hidden_size, dtype=dtype, device="meta"))
        above = start + workspace
        return Footprint(saved - above, forward_peak - above, backward_peak - above, meter.peak - above, workspace)

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns hidden states, or the response rows' log-probs if the chunk has the head."""
        if not self.position.embeds:
            self.chunk.module.set_input_tensor([hidden])
        batch = self.batch.to(hidden.device)
        output = self.chunk(batch.tokens_1T, batch.positions_T, batch.plan, batch.response_rows_N, batch.targets_N)
        result: torch.Tensor = output.logps_N if self.position.scores else output
        return result
