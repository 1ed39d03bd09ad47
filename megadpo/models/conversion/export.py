"""The exported model: a directory with Hugging Face weights, tokenizer, and a model card on how it was made."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from megadpo import __version__
from megadpo.errors import ConversionError, MegaDPOError
from megadpo.models.conversion.load_save import export_hf_weights
from megadpo.models.conversion.side_files import SideFiles, write_side_files
from megadpo.models.hf_config import Architecture
from megadpo.runtime.collectives import on_main
from megadpo.runtime.files import writing
from megadpo.runtime.parallel_state import ParallelState
from megadpo.runtime.rank_logging import global_rank

_CARD_METRICS = (
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
    "logps/accuracies",
    "logps/chosen",
    "logps/rejected",
)


def export_model(
    chunks: Sequence[torch.nn.Module],
    arch: Architecture,
    side_files: SideFiles,
    out_dir: Path,
    *,
    state: ParallelState,
    dtype: torch.dtype,
    card: str,
) -> None:
    """Writes the model as the Hugging Face directory `out_dir`: weights in `dtype`, the side files, and the card.

    Collective over all ranks; otherwise as `write_model`.
    """
    write_model(
        lambda directory: export_hf_weights(chunks, arch, directory, state=state, dtype=dtype),
        side_files,
        out_dir,
        dtype=dtype,
        card=card,
    )


def write_model(
    write: Callable[[Path], None], side_files: SideFiles, out_dir: Path, *, dtype: torch.dtype, card: str
) -> None:
    """Creates `out_dir` with the safetensors that `write(DIRECTORY)` writes in `dtype`, the side files, and the card.

    The directory gets its name when it is complete. An existing one is never overwritten unless it is empty. If the
    weights can't be written, nothing is left. Collective over all ranks, which raise the same ConversionError.
    """
    partial = out_dir.with_name(f".{out_dir.name}.partial")
    on_main(lambda: shutil.rmtree(partial, ignore_errors=True))  # left by an export that was killed
    try:
        write(partial)
    except MegaDPOError:  # raised on every rank, none of which is still writing
        if global_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise

    def finish() -> None:
        write_side_files(side_files, partial, dtype=dtype)
        with writing(partial, ConversionError):
            (partial / "README.md").write_text(card, encoding="utf-8")
        try:
            partial.rename(out_dir)
        except OSError as error:
            raise ConversionError(
                f"{out_dir} can't be made ({error.strerror}): the complete model is in {partial}: move it to a place "
                "that is free"
            ) from error

    on_main(finish)


def model_card(
    *, name: str, loss: str, steps: int, settings_yaml: str, metrics: Mapping[str, float], health: str
) -> str:
    """Markdown with YAML front matter: the training in words, the last metrics, the health verdict, and all settings.

    Each validation set has its own column; without metrics (nothing was trained) there is no table.
    """
    prefixes = sorted(
        {key.removesuffix("loss") for key in metrics if key.startswith("eval/") and key.endswith("/loss")}
    )
    titles = ["training", *(f"validation {p.removeprefix('eval/').removesuffix('/')}".strip() for p in prefixes)]
    lines = [
        *_front_matter("dpo, preference-optimization, megadpo"),
        f"# {name}, aligned to preferences",
        "",
        f"Trained for {steps} steps on preference pairs with the {loss} loss, by megadpo {__version__}.",
        "",
    ]
    if metrics:
        lines += [f"| metric | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
        for key in _CARD_METRICS:
            cells = [f"{metrics[p + key]:.6g}" if p + key in metrics else "" for p in ("", *prefixes)]
            if any(cells):
                lines.append(f"| `{key}` | {' | '.join(cells)} |")
        lines += ["", "Training values are of the last line of metrics.jsonl, computed before its update.", ""]
    lines += [f"Health of the run: {health}.", ""]
    return "\n".join([*lines, "## Settings", "", "```yaml", settings_yaml.rstrip(), "```", ""])


def conversion_card(*, name: str, checkpoint: str, origin: str) -> str:
    """Markdown with YAML front matter for converted weights, which names the checkpoint and its origin."""
    lines = [
        *_front_matter("megadpo"),
        f"# {name}",
        "",
        f"Converted from the Megatron checkpoint {checkpoint} by megadpo {__version__}. {origin}",
        "",
    ]
    return "\n".join(lines)


def _front_matter(tags: str) -> list[str]:
    return ["---", "library_name: transformers", "pipeline_tag: text-generation", f"tags: [{tags}]", "---", ""]
