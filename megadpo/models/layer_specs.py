"""Megatron layer specs of Megatron's own or Transformer Engine's modules, both with this project's core attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron.core.extensions.transformer_engine import (
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megadpo.models.activation import swiglu, te_swiglu
from megadpo.models.attention import PlanAttention
from megadpo.models.conversion.families import CHECKPOINT_NAMES
from megadpo.models.fp8 import Fp8
from megadpo.models.fp8_emulation import EmulatedColumnParallelLinear, EmulatedRowParallelLinear
from megadpo.models.norm import RMSNorm


def native_block_spec(emulated: Sequence[Fp8 | None], *, qk_norm: bool) -> TransformerBlockSubmodules:
    """Layer specs of one model chunk, built from Megatron-Core's own modules.

    `emulated` holds, for each layer, the FP8 settings that its matrix products emulate, or None.
    """
    return TransformerBlockSubmodules(
        layer_specs=[_native_layer(fp8, qk_norm=qk_norm) for fp8 in emulated], layer_norm=RMSNorm
    )


def _native_layer(fp8: Fp8 | None, *, qk_norm: bool) -> ModuleSpec:
    column, row = ColumnParallelLinear, RowParallelLinear
    if fp8 is not None:
        column = ModuleSpec(module=EmulatedColumnParallelLinear, params={"fp8": fp8})
        row = ModuleSpec(module=EmulatedRowParallelLinear, params={"fp8": fp8})
    return _layer_spec(
        qk_norm=qk_norm,
        norm=RMSNorm,
        norm_before_linear=RMSNorm,
        column_linear=column,
        row_linear=row,
        activation=swiglu,
        checkpoint_names=CHECKPOINT_NAMES,
    )


def transformer_engine_block_spec(num_layers: int, *, qk_norm: bool) -> TransformerBlockSubmodules:
    """Layer specs for `num_layers` layers, built from Transformer Engine's modules through Megatron's wrappers.

    Linear layers that follow a norm hold its weight themselves; checkpoints have it under the norm's own name.
    """
    layer = _layer_spec(
        qk_norm=qk_norm,
        norm=TENorm,
        norm_before_linear=IdentityOp,
        column_linear=TELayerNormColumnParallelLinear,
        row_linear=TERowParallelLinear,
        activation=te_swiglu(),
        checkpoint_names={},
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TENorm)


def _layer_spec(
    *,
    qk_norm: bool,
    norm: Any,
    norm_before_linear: Any,
    column_linear: Any,
    row_linear: Any,
    activation: Any,
    checkpoint_names: Mapping[str, str],
) -> ModuleSpec:
    head_norm = norm if qk_norm else IdentityOp
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm_before_linear,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column_linear,
                    core_attention=PlanAttention,
                    linear_proj=row_linear,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm_before_linear,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=column_linear, activation_func=activation, linear_fc2=row_linear),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=dict(checkpoint_names),
        ),
    )
