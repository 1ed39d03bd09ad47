"""Checks that ranks which hold the same weights hold the same bits, and names ranks that do not.

Held in common are: a split weight, by the data-parallel ranks of its part; norms and other weights that are not split,
by all ranks of a stage; a tied embedding, by those of the first and the last stage. docs/numerics.md names differences
that can't be found.

Legend: W words of a tensor, P parameters of a rank.
"""

from __future__ import annotations

import re
import socket
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megadpo.errors import TrainingError, listing
from megadpo.models.builder import is_split
from megadpo.models.policy import PolicyModel
from megadpo.runtime.collectives import gather_rows
from megadpo.runtime.parallel_state import ParallelState

# Number of words that are hashed at a time, with 8 bytes of intermediate values each: on CPU they fit into the cache,
# which is six times as fast as 2**20; on other devices a small number of calls matters.
_BLOCK_ON_CPU, _BLOCK = 2**16, 2**22
_TIED = "the tied embedding"
_NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class RankHashes:
    """A rank's position in the grid, and the hashes of its weights by name.

    `split` holds weights that are split over tensor ranks, `whole` those that are not, `tied` a tied embedding on the
    stages that have one; each weight is in one of the three.
    """

    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    split: Mapping[str, int]
    whole: Mapping[str, int]
    tied: Mapping[str, int]
    host: str = ""

    def __str__(self) -> str:
        """The rank's position in words."""
        return f"tensor {self.tensor_rank}, pipeline {self.pipeline_rank}, data {self.data_rank}, on {self.host}"


def check_replicas(modules: Sequence[PolicyModel], state: ParallelState, *, step: int) -> None:
    """Raises TrainingError on every rank if ranks hold different bits of the same weight, naming rank and weight.

    One all-gather of six numbers over the world, and one of all names and hashes if something differs. The weights must
    be gathered; if gathering is overlapped, they are between a forward pass and the next update. A single rank has
    nothing to compare.
    """
    if dist.get_world_size() == 1:
        return
    names, weights = zip(*_named_parameters(modules), strict=True)
    device, hashes_P = weights[0].device, bits_hashes(weights)
    tied_weight = _tied_weight(modules)
    kinds = ["tied" if weight is tied_weight else "split" if is_split(weight) else "whole" for weight in weights]
    is_split_P, is_whole_P, is_tied_P = (
        torch.tensor([kind == one for kind in kinds], device=device) for one in ("split", "whole", "tied")
    )
    place = (state.tensor_rank, state.pipeline_rank, state.data_rank)
    row_6 = torch.stack(
        (
            *torch.tensor(place, device=device),
            _combined_hash(hashes_P * is_split_P),
            _combined_hash(hashes_P * is_whole_P),
            (hashes_P * is_tied_P).sum(),  # at most one weight, whose number differs between stages
        )
    )
    outer = (0, state.pipeline_size - 1)
    rows: list[list[int]] = gather_rows(row_6).tolist()
    if not differing_ranks(
        [
            RankHashes(
                tensor, pipeline, data, {"split": split}, {"whole": whole}, {_TIED: tied} if pipeline in outer else {}
            )
            for tensor, pipeline, data, split, whole, tied in rows
        ]
    ):
        return
    found = list(zip(names, kinds, hashes_P.tolist(), strict=True))
    held = RankHashes(
        *place,
        split={name: value for name, kind, value in found if kind == "split"},
        whole={name: value for name, kind, value in found if kind == "whole"},
        tied=dict.fromkeys([_TIED] * kinds.count("tied"), int((hashes_P * is_tied_P).sum())),
        host=socket.gethostname(),
    )
    of_ranks: list[RankHashes] = [held] * dist.get_world_size()
    dist.all_gather_object(of_ranks, held)
    raise TrainingError(_described(step, of_ranks))


def differing_ranks(held: Sequence[RankHashes]) -> dict[int, dict[str, int]]:
    """For each differing rank, the parameters of which it holds other bits than the majority, and a rank of that.

    Without a majority, the value of the lowest rank is taken as the right one. {} if all agree.
    """
    odd: dict[int, dict[str, int]] = defaultdict(dict)
    for hashes, places in (
        ([rank.split for rank in held], [(rank.tensor_rank, rank.pipeline_rank) for rank in held]),
        ([rank.whole for rank in held], [(rank.pipeline_rank,) for rank in held]),
        ([rank.tied for rank in held], [(rank.tensor_rank,) for rank in held]),
    ):
        holders: dict[tuple[tuple[int, ...], str], list[int]] = defaultdict(list)
        for rank, place in enumerate(places):
            for name in hashes[rank]:
                holders[place, name].append(rank)
        for (_, name), ranks in holders.items():
            # Of equally common values, the first one.
            usual = Counter(hashes[rank][name] for rank in ranks).most_common(1)[0][0]
            other = next(rank for rank in ranks if hashes[rank][name] == usual)
            for rank in ranks:
                if hashes[rank][name] != usual:
                    odd[rank].setdefault(name, other)
    return dict(odd)


def check_finite(modules: Sequence[PolicyModel], *, step: int) -> None:
    """Raises TrainingError on every rank if a weight of any rank is NaN or infinite, naming rank and weight.

    One all-gather of a number over the world, and one of names if such a weight is found.
    """
    largest = torch.nn.utils.get_total_norm(
        [weight.detach() for _, weight in _named_parameters(modules)], norm_type=torch.inf
    )
    if not gather_rows((~largest.isfinite()).double()[None]).any().item():
        return
    names = [name for name, weight in _named_parameters(modules) if not weight.isfinite().all()]
    of_ranks: list[list[str]] = [names] * dist.get_world_size()
    dist.all_gather_object(of_ranks, names)
    wrong = [f"rank {rank}: {_shortened(found)}" for rank, found in enumerate(of_ranks) if found]
    raise TrainingError(
        f"step {step}: weights are NaN or infinite, and no checkpoint is made of them: resume from the last one "
        f"(train.resume=auto), with a lower optimizer.lr if it happens again:\n{listing(wrong)}"
    )


def bits_hashes(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns `bits_hash` of every tensor, [P]."""
    device = tensors[0].device
    odd_W = torch.arange(1, 2 * (_BLOCK_ON_CPU if device.type == "cpu" else _BLOCK), 2, device=device)
    return torch.stack([bits_hash(tensor, odd_W) for tensor in tensors])


def bits_hash(tensor: torch.Tensor, odd_W: torch.Tensor) -> torch.Tensor:
    """Hashes a tensor's bits to an int64 scalar on its device, exactly, so that the order of summation does not matter.

    The hash is the sum of the tensor's words times odd numbers (`odd_W`: 1, 3, 5, ... for the words of a block), modulo
    2**64. A change of one word always changes it; changes of several words do unless, so multiplied, they cancel.
    """
    blocks = [(block_W * odd_W[: len(block_W)]).sum() for block_W in _words(tensor).split(len(odd_W))]
    return blocks[0] if len(blocks) == 1 else _combined_hash(torch.stack(blocks))


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers of 32 bits, or of 16 if its bf16 values can't be viewed in pairs."""
    flat = tensor.detach().contiguous().view(-1)
    in_pairs = flat.element_size() == 4 or not (len(flat) % 2 or flat.storage_offset() % 2)
    return flat.view(torch.int32 if in_pairs else torch.int16)


def _combined_hash(hashes_P: torch.Tensor) -> torch.Tensor:
    """Combines several hashes to one, by the same rule."""
    return (hashes_P * torch.arange(1, 2 * len(hashes_P), 2, device=hashes_P.device)).sum()


def _named_parameters(modules: Sequence[PolicyModel]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yields all parameters of this rank, with names in which layers are counted over the whole model."""
    for module in modules:
        offset = module.decoder.layers[0].layer_number - 1 if len(module.decoder.layers) else 0
        for name, weight in module.named_parameters():
            found = re.match(r"(decoder\.layers\.)(\d+)(.*)", name)
            yield (f"{found[1]}{int(found[2]) + offset}{found[3]}" if found else name), weight


def _tied_weight(modules: Sequence[PolicyModel]) -> torch.Tensor | None:
    """This rank's copy of an embedding that is also the head's weight; None without one."""
    for module in modules:
        if module.share_embeddings_and_output_weights and (module.pre_process or module.post_process):
            weight: torch.Tensor = module.shared_embedding_or_output_weight()
            return weight
    return None


def _described(step: int, held: Sequence[RankHashes]) -> str:
    lines = []
    for rank, others in differing_ranks(held).items():
        ranks = ", ".join(map(str, sorted(set(others.values()))))
        lines.append(f"rank {rank} ({held[rank]}): {_shortened(list(others))}, unlike rank {ranks}")
    return (
        f"step {step}: ranks hold different bits of the same weights, and no checkpoint is made of them. Memory, a "
        f"card or a link is likely faulty: resume from the last checkpoint (train.resume=auto), without that machine "
        f"if it happens again (of two ranks alone, the other one may be the faulty one). train.check_ranks_every=null "
        f"trains on without looking:\n{listing(lines)}"
    )


def _shortened(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
