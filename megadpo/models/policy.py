"""Megatron's GPTModel as a policy: its last stage returns response log-probs, never logits.

Legend: T rows of the packed stream (T/tp under sequence parallelism), H hidden size, N response rows, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megadpo.attention_plan import AttentionPlan
from megadpo.logprobs import response_log_probs
from megadpo.models.attention import PlanParams
from megadpo.models.hf_config import Architecture


class ResponseHead(ColumnParallelLinear):
    """The output layer as a map from hidden states to response log-probs.

    It is a layer with a forward of its own, because Megatron's parameter-gather hook fires when the module that owns
    the weight is called.
    """

    vocab_size: int

    def forward(
        self,
        hidden_T1H: torch.Tensor,
        response_rows_N: torch.Tensor,
        targets_N: torch.Tensor,
        weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """fp32 log-probs [N] of the targets, equal on all tensor-parallel ranks.

        Selects the response rows before the matrix product: prompt rows never meet the vocabulary. `weight` is the
        embedding's when the two are tied on this stage. Collectives: under sequence parallelism an all-gather of the
        hidden states (reduce-scatter in the backward), otherwise an all-reduce of the rows' gradient in the backward;
        and those of `response_log_probs`.
        """
        group = self.tp_group
        if self.sequence_parallel:
            hidden_TH = gather_from_sequence_parallel_region(hidden_T1H, group=group).squeeze(1)
            rows_NH = hidden_TH.index_select(0, response_rows_N)
        else:
            rows_NH = hidden_T1H.squeeze(1).index_select(0, response_rows_N)
            rows_NH = copy_to_tensor_model_parallel_region(rows_NH, group=group)
        return response_log_probs(
            rows_NH,
            self.weight if weight is None else weight,
            targets_N,
            group=group,
            vocab_start=group.rank() * self.output_size_per_partition,
            vocab_size=self.vocab_size,
        )


class PolicyModel(GPTModel):
    """One pipeline chunk of the language model, called with a packed stream and its attention plan."""

    def __init__(
        self,
        arch: Architecture,
        config: TransformerConfig,
        spec: ModuleSpec | TransformerBlockSubmodules,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=arch.padded_vocab_size(config.tensor_model_parallel_size),
            max_sequence_length=arch.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=arch.tied_embeddings,
            position_embedding_type="none",  # rotary tables are made here, from transformers' own frequencies
            vp_stage=vp_stage,
        )
        # A plain attribute: a buffer would follow the model into bf16 and into checkpoints.
        self.inv_freq = torch.tensor(arch.inv_freq, dtype=torch.float32)
        if post_process:
            # ResponseHead adds a forward and no parameters; building a second layer would allocate the head twice.
            self.output_layer.__class__ = ResponseHead
            self.output_layer.vocab_size = arch.vocab_size

    def forward(
        self,
        tokens_1T: torch.Tensor,
        positions_T: torch.Tensor,
        plan: AttentionPlan,
        response_rows_N: torch.Tensor,
        targets_N: torch.Tensor,
    ) -> torch.Tensor:
        """Response log-probs fp32 [N] on the last stage, hidden states [T, 1, H] on the others."""
        hidden: torch.Tensor | None = None
        if self.pre_process:
            hidden = self.embedding(input_ids=tokens_1T, position_ids=None)
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=self._rotary_table(positions_T),
            packed_seq_params=PlanParams.of(plan),
        )
        if not self.post_process:
            assert hidden is not None
            return hidden
        tied: Any = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logps_N: torch.Tensor = self.output_layer(hidden, response_rows_N, targets_N, weight=tied)
        return logps_N

    def _rotary_table(self, positions_T: torch.Tensor) -> torch.Tensor:
        """Angles [T, 1, 1, D] in fp32, by position: rows restart at every sequence of the stream."""
        self.inv_freq = self.inv_freq.to(positions_T.device)
        angles_TD2 = torch.outer(positions_T.float(), self.inv_freq)
        return torch.cat((angles_TD2, angles_TD2), dim=-1)[:, None, None, :]
