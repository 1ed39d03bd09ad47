"""Whether ranks that hold the same weights still hold the same bits, and which rank does not.

Held in common are: a split weight, by the data-parallel ranks of its part; norms and the like, which are not split, by
all ranks of a stage; a tied embedding, by those of the first and the last stage. docs/numerics.md says what can't be
seen.

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

# Words that are hashed together, at 8 bytes each for what is between: so many stay in a CPU's cache, which makes it
# six times as fast as 2**20; on other devices few calls count.
_BLOCK_ON_CPU, _BLOCK = 2**16, 2**22
_TIED = "the tied embedding"
_NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class RankHashes:
    """What a rank holds: its place in the grid, and hashes by name.

    They are of weights that are split over tensor ranks, of those that are whole, and of a tied embedding, on the
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
        """The place in words."""
        return f"tensor {self.tensor_rank}, pipeline {self.pipeline_rank}, data {self.data_rank}, on {self.host}"


def check_replicas(modules: Sequence[PolicyModel], state: ParallelState, *, step: int) -> None:
    """Raises TrainingError on every rank where ranks hold different bits of the same weight, naming rank and weight.

    One all-gather of six numbers over the world, and one of all names and hashes where something differs. The weights
    must be gathered: where gathering is overlapped, they are from a forward pass to the update behind it. A rank alone
    has nobody to compare with.
    """
    if dist.get_world_size() == 1:
        return
    names, weights = zip(*_named(modules), strict=True)
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
            _combined(hashes_P * is_split_P),
            _combined(hashes_P * is_whole_P),
            (hashes_P * is_tied_P).sum(),  # of one at most, whose number differs between stages
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
    """By rank, the parameters of which it holds other bits than most who hold them, each with such another rank.

    Where no value has most ranks behind it, that of the lowest rank is taken for the right one. {} where all agree.
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
            # Of values that are equally common, the one that comes first.
            usual = Counter(hashes[rank][name] for rank in ranks).most_common(1)[0][0]
            other = next(rank for rank in ranks if hashes[rank][name] == usual)
            for rank in ranks:
                if hashes[rank][name] != usual:
                    odd[rank].setdefault(name, other)
    return dict(odd)


def check_finite(modules: Sequence[PolicyModel], *, step: int) -> None:
    """Raises TrainingError on every rank where a weight of any rank is NaN or infinite, naming rank and weight.

    One all-gather of a number over the world, and one of names where something is found.
    """
    largest = torch.nn.utils.get_total_norm([weight.detach() for _, weight in _named(modules)], norm_type=torch.inf)
    if not gather_rows((~largest.isfinite()).double()[None]).any().item():
        return
    names = [name for name, weight in _named(modules) if not weight.isfinite().all()]
    of_ranks: list[list[str]] = [names] * dist.get_world_size()
    dist.all_gather_object(of_ranks, names)
    wrong = [f"rank {rank}: {_few(found)}" for rank, found in enumerate(of_ranks) if found]
    raise TrainingError(
        f"step {step}: weights are NaN or infinite, and no checkpoint is made of them: resume from the last one "
        f"(train.resume=auto), with a lower optimizer.lr if it happens again:\n{listing(wrong)}"
    )


def bits_hashes(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """`bits_hash` of every tensor, [P]."""
    device = tensors[0].device
    odd_W = torch.arange(1, 2 * (_BLOCK_ON_CPU if device.type == "cpu" else _BLOCK), 2, device=device)
    return torch.stack([bits_hash(tensor, odd_W) for tensor in tensors])


def bits_hash(tensor: torch.Tensor, odd_W: torch.Tensor) -> torch.Tensor:
    """A hash of a tensor's bits, an int64 scalar on its device: exact, so that no order of summation matters.

    The sum of its words times odd numbers (`odd_W`: 1, 3, 5, ... for the words of a block), modulo 2**64. One word that
    changes always changes it, whichever bits; several do unless their changes, so multiplied, cancel.
    """
    blocks = [(block_W * odd_W[: len(block_W)]).sum() for block_W in _words(tensor).split(len(odd_W))]
    return blocks[0] if len(blocks) == 1 else _combined(torch.stack(blocks))


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers of 32 bits, or of 16 where an odd number of bf16 values can't be seen so."""
    flat = tensor.detach().contiguous().view(-1)
    in_pairs = flat.element_size() == 4 or not (len(flat) % 2 or flat.storage_offset() % 2)
    return flat.view(torch.int32 if in_pairs else torch.int16)


def _combined(hashes_P: torch.Tensor) -> torch.Tensor:
    """One hash of several, by the same rule."""
    return (hashes_P * torch.arange(1, 2 * len(hashes_P), 2, device=hashes_P.device)).sum()


def _named(modules: Sequence[PolicyModel]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """All parameters of this rank, by names in which layers are counted over the whole model."""
    for module in modules:
        offset = module.decoder.layers[0].layer_number - 1 if len(module.decoder.layers) else 0
        for name, weight in module.named_parameters():
            found = re.match(r"(decoder\.layers\.)(\d+)(.*)", name)
            yield (f"{found[1]}{int(found[2]) + offset}{found[3]}" if found else name), weight


def _tied_weight(modules: Sequence[PolicyModel]) -> torch.Tensor | None:
    """This rank's copy of an embedding that is the head's weight too; None without one."""
    for module in modules:
        if module.share_embeddings_and_output_weights and (module.pre_process or module.post_process):
            weight: torch.Tensor = module.shared_embedding_or_output_weight()
            return weight
    return None


def _described(step: int, held: Sequence[RankHashes]) -> str:
    lines = []
    for rank, others in differing_ranks(held).items():
        ranks = ", ".join(map(str, sorted(set(others.values()))))
        lines.append(f"rank {rank} ({held[rank]}): {_few(list(others))}, unlike rank {ranks}")
    return (
        f"step {step}: ranks hold different bits of the same weights, and no checkpoint is made of them. Memory, a "
        f"card or a link is likely faulty: resume from the last checkpoint (train.resume=auto), without that machine "
        f"if it happens again (of two ranks alone, the other one may be the faulty one). train.check_ranks_every=null "
        f"trains on without looking:\n{listing(lines)}"
    )


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
