"""Log-probs by plain transformers, one sequence at a time: nothing packed, padded or shared that could go wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from megadpo.data.tokenization import TokenizedPair


def load_hf(directory: str | Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The model that transformers makes of a directory, as it is."""
    return AutoModelForCausalLM.from_pretrained(str(directory), dtype=dtype, attn_implementation="eager").eval()


def sequence_logp(model: torch.nn.Module, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
    """Σ log p(response token | what precedes it), fp64 scalar with gradient."""
    ids = torch.tensor([[*map(int, prompt), *map(int, response)]])
    logps = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1].float(), dim=-1)
    token_logps = logps.gather(1, ids[0, 1:, None]).squeeze(1)
    return token_logps[len(prompt) - 1 :].double().sum()


@torch.no_grad()
def pair_logps(directory: str | Path, pairs: Sequence[TokenizedPair]) -> dict[int, tuple[float, float]]:
    """{pair index: (chosen, rejected)} under the model of a Hugging Face directory, fp32."""
    model = load_hf(directory)
    return {
        pair.index: (
            float(sequence_logp(model, pair.prompt.tolist(), pair.chosen.tolist())),
            float(sequence_logp(model, pair.prompt.tolist(), pair.rejected.tolist())),
        )
        for pair in pairs
    }
