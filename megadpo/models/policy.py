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

from megadpo.loss.logprobs import TokenScores, response_log_probs
from megadpo.models.attention import MicrobatchAttention
from megadpo.models.attention_plan import AttentionPlan
from megadpo.models.hf_config import Architecture
from megadpo.models.rotary import RotaryTable
from megadpo.models.sdpa import PrepareAttention


class ResponseHead(ColumnParallelLinear):
    """The output layer as a map from hidden states to response log-probs.

    It overrides the layer's forward, because Megatron's parameter-gather hook runs when the module that owns the weight
    is called.
    """

    vocab_size: int
    logits_bytes: int

    def forward(
        self,
        hidden_T1H: torch.Tensor,
        response_rows_N: torch.Tensor,
        targets_N: torch.Tensor,
        *,
        weight: torch.Tensor | None = None,
        token_statistics: bool = False,
    ) -> TokenScores:
        """Returns fp32 log-probs [N] of the targets, and statistics if asked for; equal on all tensor-parallel ranks.

        Only response rows are multiplied with the head, no prompt rows. `weight` is the embedding's if the two are tied
        on this stage. Collectives: under sequence parallelism an all-gather of the hidden states (reduce-scatter in the
        backward), otherwise an all-reduce of the rows' gradient in the backward; and those of `response_log_probs`.
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
            logits_bytes=self.logits_bytes,
            token_statistics=token_statistics,
        )


class PolicyModel(GPTModel):
    """One pipeline chunk of the language model, called with a packed stream and its attention plan.

    With `token_statistics` set, the last stage also returns statistics of each token.
    """

    def __init__(
        self,
        arch: Architecture,
        config: TransformerConfig,
        spec: ModuleSpec | TransformerBlockSubmodules,
        *,
        prepare_attention: PrepareAttention,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
        logits_mib: int,
    ) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=arch.padded_vocab_size(config.tensor_model_parallel_size),
            max_sequence_length=arch.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=arch.tied_embeddings,
            position_embedding_type="none",  # rotary tables are built here, from transformers' own frequencies
            vp_stage=vp_stage,
        )
        # A plain attribute: a buffer would be cast to bf16 with the model, and saved in checkpoints.
        self.inv_freq = torch.tensor(arch.inv_freq, dtype=torch.float32)
        self.rope_scaling = arch.rope_attention_scaling
        self.prepare_attention = prepare_attention
        self.token_statistics = False
        if post_process:
            # ResponseHead only overrides methods; building a second layer would allocate the head's weight twice.
            self.output_layer.__class__ = ResponseHead
            self.output_layer.vocab_size = arch.vocab_size
            self.output_layer.logits_bytes = logits_mib * 2**20

    def forward(
        self,
        tokens_1T: torch.Tensor,
        positions_T: torch.Tensor,
        plan: AttentionPlan,
        response_rows_N: torch.Tensor,
        targets_N: torch.Tensor,
    ) -> torch.Tensor | TokenScores:
        """Returns response log-probs fp32 [N] on the last stage, hidden states [T, 1, H] on the others."""
        hidden: torch.Tensor | None = None
        if self.pre_process:
            hidden = self.embedding(input_ids=tokens_1T, position_ids=None)
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            packed_seq_params=self._attention(positions_T, plan),
        )
        if not self.post_process:
            assert hidden is not None
            return hidden
        tied: Any = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        scores: TokenScores = self.output_layer(
            hidden, response_rows_N, targets_N, weight=tied, token_statistics=self.token_statistics
        )
        return scores

    def _attention(self, positions_T: torch.Tensor, plan: AttentionPlan) -> MicrobatchAttention:
        """The microbatch's kernel and rotary table, for all layers."""
        device, dtype = positions_T.device, self.config.params_dtype
        self.inv_freq = self.inv_freq.to(device)
        return MicrobatchAttention(
            num_tokens=plan.num_tokens,
            attend=self.prepare_attention(plan, device),
            rotary=RotaryTable.of(positions_T, self.inv_freq, scaling=self.rope_scaling, dtype=dtype),
        )
