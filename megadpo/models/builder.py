"""Builds this rank's model chunks for an architecture and a layout, and fills them from a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TELinear
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megadpo.models.conversion.load_save import load_hf_weights
from megadpo.models.hf_config import Architecture
from megadpo.models.kernels import attention_factory
from megadpo.models.layer_specs import native_block_spec, transformer_engine_block_spec
from megadpo.models.options import ModelOptions
from megadpo.models.policy import PolicyModel
from megadpo.runtime.parallel_state import ParallelState


def transformer_config(arch: Architecture, state: ParallelState, options: ModelOptions) -> TransformerConfig:
    """Megatron's configuration of the model and its schedule.

    The schedule divides gradients by the all-reduced number of pairs (`calculate_per_token_loss`). It sends pipeline
    messages one by one, since batched ones get mixed up if the previous and the next stage are the same rank.
    """
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=options.dtype,
        pipeline_dtype=options.dtype,
        bf16=options.dtype is torch.bfloat16,
        tensor_model_parallel_size=state.tensor_size,
        pipeline_model_parallel_size=state.pipeline_size,
        virtual_pipeline_model_parallel_size=state.virtual_pipeline_size if state.virtual_pipeline_size > 1 else None,
        sequence_parallel=options.sequence_parallel,
        num_layers_in_first_pipeline_stage=options.split.first,
        num_layers_in_last_pipeline_stage=options.split.last,
        recompute_granularity=options.recompute.granularity,
        recompute_method=options.recompute.method,
        recompute_num_layers=options.recompute.num_layers,
        recompute_modules=list(options.recompute.modules),
        calculate_per_token_loss=True,
        batch_p2p_comm=False,
        deallocate_pipeline_outputs=True,
        # Transformer Engine's layers would first create every whole matrix in fp32.
        use_cpu_initialization=options.backend == "native",
        perform_initialization=False,  # every weight comes from the checkpoint
        masked_softmax_fusion=False,
        # For Megatron's own layers; the head is one with any backend.
        gradient_accumulation_fusion=layers._grad_accum_fusion_available,
        use_te_activation_func=True,  # by which the layer spec's own activation is used
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        # With it Megatron keeps Transformer Engine from its unfused kernel, which materialises all scores.
        attention_backend=AttnBackend.fused if options.attention == "transformer_engine" else AttnBackend.auto,
        **(options.fp8.megatron_fields() if options.fp8 is not None else {}),
    )


def build_model(arch: Architecture, state: ParallelState, options: ModelOptions) -> list[PolicyModel]:
    """Builds this rank's chunks of the model with uninitialised weights: one, or one per virtual pipeline stage."""
    config = transformer_config(arch, state, options)
    prepare_attention = attention_factory(
        options.attention,
        dtype=options.dtype,
        heads=arch.num_attention_heads // state.tensor_size,
        kv_heads=max(1, arch.num_query_groups // state.tensor_size),
        head_dim=arch.head_dim,
    )
    interleaved = state.virtual_pipeline_size > 1
    chunks = []
    for stage in range(state.virtual_pipeline_size):
        vp_stage = stage if interleaved else None
        chunk = PolicyModel(
            arch,
            config,
            _block_spec(config, options, vp_stage, state, qk_norm=arch.qk_norm),
            prepare_attention=prepare_attention,
            pre_process=state.pipeline_rank == 0 and stage == 0,
            post_process=state.is_last_stage and stage == state.virtual_pipeline_size - 1,
            vp_stage=vp_stage,
            logits_mib=options.logits_mib,
        )
        _mark_tensor_parallel_weights(chunk)
        if options.backend == "transformer_engine":
            _accumulate_weight_gradients(chunk)
        chunks.append(chunk.to(options.device.torch_device))
    return chunks


def _block_spec(
    config: TransformerConfig, options: ModelOptions, vp_stage: int | None, state: ParallelState, *, qk_norm: bool
) -> TransformerBlockSubmodules:
    num_layers = get_num_layers_to_build(config, vp_stage, state.pipeline_rank)
    if options.backend == "transformer_engine":
        return transformer_engine_block_spec(num_layers, qk_norm=qk_norm)
    first = get_transformer_layer_offset(config, vp_stage, state.pipeline_rank)
    fp8 = options.fp8 if options.fp8 is not None and options.fp8.emulated else None
    covered = [fp8 is not None and fp8.covers(first + index, config.num_layers) for index in range(num_layers)]
    return native_block_spec([fp8 if is_covered else None for is_covered in covered], qk_norm=qk_norm)


def _mark_tensor_parallel_weights(chunk: torch.nn.Module) -> None:
    """Marks weights that are split over tensor-parallel ranks; the gradient norm counts all others on one rank only.

    Megatron sets these marks while it initialises weights, which is skipped here; Transformer Engine sets its own.
    """
    for module in chunk.modules():
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)):
            split = 0
        elif isinstance(module, RowParallelLinear):
            split = 1
        else:
            continue
        weight = module.weight
        if weight is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=split, stride=1)


def is_split(weight: torch.nn.Parameter) -> bool:
    """True if each tensor rank holds a part of the weight; Megatron's mark is also on some that are not split."""
    return hasattr(weight, "tensor_model_parallel") and bool(weight.tensor_model_parallel)


def fuses_weight_gradients(backend: str) -> bool:
    """True if weight gradients are added to the fp32 buffer inside the matrix product, without a separate pass.

    Megatron's layers need apex's extension for it on CUDA; on CPU device.py replaces that.
    """
    return backend == "transformer_engine" or layers._grad_accum_fusion_available


def _accumulate_weight_gradients(chunk: torch.nn.Module) -> None:
    """Has Transformer Engine's layers add weight gradients to Megatron's buffer inside the matrix product.

    Megatron sets this only if the extension is installed that its own layers need.
    """
    for module in chunk.modules():
        if isinstance(module, (TELinear, TELayerNormColumnParallelLinear)):
            module.fuse_wgrad_accumulation = True


def load_model(
    arch: Architecture, state: ParallelState, hf_path: Path | str, options: ModelOptions
) -> list[PolicyModel]:
    """Builds the model and loads the safetensors of a Hugging Face directory; each rank reads the slices it needs."""
    chunks = build_model(arch, state, options)
    load_hf_weights(chunks, arch, hf_path, tp_rank=state.tensor_rank, tp_size=state.tensor_size)
    return chunks
