"""Compares a checkpoint with a Hugging Face directory: weights, side files, and log-probs on request."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from megadpo.checkpoint.description import stored_dtype
from megadpo.checkpoint.directory import HF_DIRECTORY
from megadpo.checkpoint.state import WEIGHTS_FROM, load_weights, readable
from megadpo.commands.convert import at_work, open_weights
from megadpo.config.choices import Dtype
from megadpo.data.dataset import iter_rows, parse_row
from megadpo.data.layouts import Keys
from megadpo.data.loader import BatchBuilder
from megadpo.data.tokenization import TokenizedPair, load_tokenizer, tokenize_pair
from megadpo.errors import ConfigError, ConversionError, listing
from megadpo.forward_step import score_batch
from megadpo.models.builder import build_model
from megadpo.models.conversion.compare import WeightDifference, different_weights, sum_up
from megadpo.models.conversion.load_save import check_hf_weights
from megadpo.models.conversion.side_files import different_side_files, read_side_files
from megadpo.models.hf_config import Architecture, differences, read_architecture
from megadpo.models.options import ModelOptions
from megadpo.models.policy import PolicyModel
from megadpo.runtime.collectives import on_every, on_main
from megadpo.runtime.device import Device
from megadpo.runtime.parallel_state import ParallelState
from megadpo.runtime.progress import ProgressBar
from megadpo.runtime.rank_logging import get_logger, global_rank, launched_world_size
from megadpo.setup.backend import TORCH_DTYPES
from megadpo.setup.datasets import batch_shape
from megadpo.setup.session import build_pipeline, open_world

logger = get_logger(__name__)

# Of one log-prob: sums in another order differ by less than the first, the second is for sums near zero.
_RELATIVE, _ABSOLUTE = 1e-4, 1e-5
_TOKENS_PER_MICROBATCH = 4096
# transformers scores on rank 0 alone, one sequence at a time.
_PATIENCE_S = 86_400.0


def verify(hf_dir: Path, checkpoint: Path, *, pairs_file: Path | None, max_pairs: int, device_kind: str) -> bool:
    """True if all weights, in the checkpoint's format, and side files are equal; prints what differs. On all ranks.

    With `pairs_file`, the log-probs of its first `max_pairs` rows under the checkpoint and under transformers' own
    model must agree too, both in fp32. ConversionError for models that can't be compared.
    """
    arch = read_architecture(checkpoint / HF_DIRECTORY)
    _check_same_model(arch, read_architecture(hf_dir), hf_dir, checkpoint)
    stored = Dtype(stored_dtype(checkpoint))
    pairs = [] if pairs_file is None else _read_pairs(pairs_file, max_pairs, hf_dir, arch)
    num_stages = stages(arch) if pairs else 1
    with open_world(device_kind) as device:
        on_main(lambda: check_hf_weights(arch, hf_dir))
        same_files = on_main(lambda: _compare_side_files(hf_dir, checkpoint))
        different = _compare_weights(checkpoint, arch, hf_dir, stored)
        on_main(lambda: _show_weights(different, arch, stored))
        same_model = same_files and not different
        if not pairs:
            return same_model
        state = build_pipeline(num_stages)
        chunks = _load_whole(checkpoint, arch, state, device)
        scores = _checkpoint_logps(chunks, arch, pairs, state, device)
        del chunks  # transformers' model is about to need the room
        same_logps = on_main(lambda: _compare_logps(hf_dir, stored, pairs, scores), patience_s=_PATIENCE_S)
        return same_logps and same_model


def stages(arch: Architecture) -> int:
    """Pipeline stages: one for each process of the launch. ConfigError where they can't share the layers out evenly."""
    world = launched_world_size()
    if arch.num_layers % world:
        fitting = [str(n) for n in range(1, arch.num_layers + 1) if arch.num_layers % n == 0]
        raise ConfigError(
            f"--nproc-per-node={world}: must divide the model's {arch.num_layers} layers, which the processes share: "
            f"use one of {', '.join(fitting)}"
        )
    return world


def _check_same_model(ours: Architecture, theirs: Architecture, hf_dir: Path, checkpoint: Path) -> None:
    different = differences(theirs, ours)
    if different:
        raise ConversionError(
            f"{hf_dir} and {checkpoint} are models of another shape or kind; name the directory that the checkpoint "
            f"was made from. What differs:\n{listing(different)}"
        )


def _compare_side_files(hf_dir: Path, checkpoint: Path) -> bool:
    """True if tokenizer, chat templates and configuration are the same; prints what differs. On one rank."""
    different = different_side_files(read_side_files(hf_dir), read_side_files(checkpoint / HF_DIRECTORY))
    if different:
        table = Table("file that differs", "how")
        for name, how in different.items():
            table.add_row(name, how)
        Console().print(table)
    return not different


# Weights


def _compare_weights(checkpoint: Path, arch: Architecture, hf_dir: Path, stored: Dtype) -> list[WeightDifference]:
    """The weights that differ, by name, the same on all ranks. Collective over all ranks."""
    reader = open_weights(checkpoint, arch)

    def compare() -> list[WeightDifference]:
        with readable(checkpoint, WEIGHTS_FROM):
            return different_weights(arch, reader, hf_dir, stored=TORCH_DTYPES[stored], worker=worker)

    with at_work(f"comparing {arch.num_parameters:,} parameters") as worker:
        mine = on_every(compare)
    everyone: list[list[WeightDifference]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    return sum_up(difference for found in everyone for difference in found)


def _show_weights(different: Sequence[WeightDifference], arch: Architecture, stored: Dtype) -> None:
    if not different:
        logger.info("all %s parameters are equal, in %s", f"{arch.num_parameters:,}", stored)
        return
    table = Table("weight that differs", "values", "largest difference")
    for difference in different:
        table.add_row(difference.name, str(difference.values), f"{difference.largest:.3g}")
    Console().print(table)


# Log-probs


def _load_whole(checkpoint: Path, arch: Architecture, state: ParallelState, device: Device) -> list[PolicyModel]:
    """This rank's chunks of a checkpoint's model, in fp32, where rounding is too small to look like a difference.

    Collective over all ranks.
    """
    started = time.perf_counter()
    options = ModelOptions(device=device, dtype=torch.float32, sequence_parallel=False)
    chunks = build_model(arch, state, options)
    with Console(stderr=True, quiet=global_rank() != 0).status(f"reading {checkpoint}"):
        load_weights(checkpoint, chunks, vocab_size=arch.vocab_size)
    logger.info("reading %s: %.1f s", checkpoint, time.perf_counter() - started)
    return chunks


def _read_pairs(path: Path, max_pairs: int, hf_dir: Path, arch: Architecture) -> list[TokenizedPair]:
    """The first rows as tokens; those that the model has no positions for, or nothing to score, are left out."""
    keys, tokenizer = Keys("prompt", "chosen", "rejected"), load_tokenizer(hf_dir)
    rows = islice(iter_rows([str(path)], keys), max_pairs)
    read = [tokenize_pair(parse_row(row, keys), tokenizer).pair for row in rows]
    pairs = [pair for pair in read if _can_be_scored(pair, arch.max_position_embeddings)]
    if len(pairs) < len(read):
        logger.warning(
            "%d of %d pairs are left out: an empty response, or longer than the model's %d positions",
            len(read) - len(pairs),
            len(read),
            arch.max_position_embeddings,
        )
    if not pairs:
        raise ConfigError(f"--pairs={path}: none of its first {len(read)} pairs can be compared: give others")
    return pairs


def _can_be_scored(pair: TokenizedPair, most: int) -> bool:
    shorter, longer = sorted((len(pair.chosen), len(pair.rejected)))
    return shorter > 0 and len(pair.prompt) + longer <= most


def _checkpoint_logps(
    chunks: Sequence[PolicyModel],
    arch: Architecture,
    pairs: Sequence[TokenizedPair],
    state: ParallelState,
    device: Device,
) -> dict[int, tuple[float, float]]:
    """{pair index: (chosen, rejected)} under the checkpoint, on every rank."""
    shape = batch_shape(state, sequence_parallel=False)
    builder = BatchBuilder(
        shape=shape,
        tokens_per_microbatch=_TOKENS_PER_MICROBATCH,
        pad_token_id=0,
        share_prompt=True,
        flop_rates=arch.flop_rates,
    )
    batch = builder.build(pairs)
    logps_G4 = score_batch(chunks, batch, state, device.torch_device)
    return {
        index: (chosen, rejected)
        for index, (chosen, rejected, *_) in zip(batch.pair_indices, logps_G4.tolist(), strict=True)
    }


def _compare_logps(
    hf_dir: Path, stored: Dtype, pairs: Sequence[TokenizedPair], ours: Mapping[int, tuple[float, float]]
) -> bool:
    """True if both models' log-probs agree for all pairs; prints them. On one rank."""
    table = Table("pair", "response", "checkpoint", "transformers", "relative difference")
    agreeing = 0
    for pair, theirs in zip(pairs, _transformers_logps(hf_dir, stored, pairs), strict=True):
        both = list(zip(ours[pair.index], theirs, strict=True))
        agreeing += all(math.isclose(a, b, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE) for a, b in both)
        for response, (a, b) in zip(("chosen", "rejected"), both, strict=True):
            relative = abs(a - b) / max(abs(b), _ABSOLUTE)
            table.add_row(str(pair.index), response, f"{a:.6f}", f"{b:.6f}", f"{relative:.1e}")
    Console().print(table)
    logger.info("log-probs of %d of %d pairs agree to %g relative, in fp32", agreeing, len(pairs), _RELATIVE)
    return agreeing == len(pairs)


def _transformers_logps(hf_dir: Path, stored: Dtype, pairs: Sequence[TokenizedPair]) -> Iterator[tuple[float, float]]:
    """(chosen, rejected) of each pair under transformers' model in fp32, its weights rounded to `stored` first.

    One sequence at a time: nothing is packed, padded or shared that could go wrong.
    """
    model = AutoModelForCausalLM.from_pretrained(str(hf_dir), dtype=TORCH_DTYPES[stored], local_files_only=True)
    model = model.float().eval()

    def logp(prompt: list[int], response: list[int]) -> float:
        logits_NV = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        targets_N = torch.tensor(response)
        return float(torch.log_softmax(logits_NV, dim=-1).gather(1, targets_N[:, None]).double().sum())

    with torch.no_grad(), ProgressBar("scoring with transformers", total=len(pairs), visible=True) as bar:
        for done, pair in enumerate(pairs, 1):
            prompt = pair.prompt.tolist()
            yield logp(prompt, pair.chosen.tolist()), logp(prompt, pair.rejected.tolist())
            bar.update(done, f"{done} of {len(pairs)} pairs")
