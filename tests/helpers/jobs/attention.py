"""What one rank does in tests of attention kernels inside a whole model."""

from __future__ import annotations

from unittest import mock

import numpy as np
import torch
from torch.nn.attention import varlen as torch_varlen

from megadpo.data.batch import build_batch
from megadpo.data.tokenization import TokenizedPair
from megadpo.forward_step import sum_log_probs
from megadpo.models.builder import load_model
from megadpo.models.hf_config import read_architecture
from megadpo.models.options import ModelOptions
from megadpo.optimizer.build import wrap_data_parallel
from megadpo.runtime.device import megatron_device, select_device
from megadpo.runtime.parallel_state import build_parallel_state, distributed
from tests.helpers.stand_ins.varlen_kernels import torch_2_12

# Lengths of prompt, chosen and rejected.
_LENGTHS = ((5, 4, 9), (1, 3, 1), (8, 1, 2))


def outputs_of_kernels(model: str, *, share_prompt: bool) -> tuple[dict[str, dict[str, np.ndarray]], int]:
    """By kernel, log-probs and every weight's gradient in fp32, and how often the stand-in for varlen was called."""
    device = select_device("cpu")
    kernel = mock.create_autospec(torch_2_12, side_effect=torch_2_12)
    with (
        megatron_device(device),
        distributed(device, timeout_s=60),
        mock.patch.object(torch_varlen, "varlen_attn", kernel),
    ):
        state = build_parallel_state(tensor=1, pipeline=1, virtual_pipeline=None, seed=0, timeout_s=60)
        arch = read_architecture(model)
        draw = np.random.default_rng(3)
        pairs = [
            TokenizedPair(index, *(draw.integers(arch.vocab_size, size=length) for length in lengths))
            for index, lengths in enumerate(_LENGTHS)
        ]
        batch = build_batch(pairs, num_tokens=52, pad_token_id=0, share_prompt=share_prompt)
        results: dict[str, dict[str, np.ndarray]] = {}
        for attention in ("sdpa", "varlen"):
            options = ModelOptions(device=device, dtype=torch.float32, sequence_parallel=False, attention=attention)
            (chunk,) = wrap_data_parallel(load_model(arch, state, model, options))
            output = chunk(batch.tokens_1T, batch.positions_T, batch.plan, batch.response_rows_N, batch.targets_N)
            sums = sum_log_probs(batch, output)
            (sums.chosen_B - 0.7 * sums.rejected_B).sum().backward()
            results[attention] = {
                "chosen": sums.chosen_B.detach().numpy(),
                "rejected": sums.rejected_B.detach().numpy(),
                **{name: weight.main_grad.numpy() for name, weight in chunk.named_parameters()},
            }
        return results, kernel.call_count
