"""The values of configuration keys that take one of a few names."""

from __future__ import annotations

from enum import Enum


class Choice(str, Enum):
    """Base of the enums; a member is equal to its YAML text (`Dtype.bf16 == "bf16"`), and prints as that."""

    def __str__(self) -> str:
        return str(self.value)


class Truncation(Choice):
    """Treatment of pairs longer than `data.max_length`."""

    keep_start = "keep_start"  # responses are cut at the end; a prompt that fills max_length alone drops its pair
    keep_end = "keep_end"  # the prompt's beginning is cut, once per pair, by as much as the longer response needs
    drop = "drop"  # the pair is dropped and counted
    error = "error"  # the run stops at the first one


class ResumeChange(Choice):
    """Changes to a run that a resumed run may make if they are declared."""

    data = "data"  # other pairs, tokenizer or template; training starts with their first epoch
    batch_size = "batch_size"  # train.global_batch_size; the run continues after the last pair it has seen
    loss = "loss"  # keys of loss.
    reference = "reference"  # its weights, unless they follow the policy, or its existence


class OnError(Choice):
    """Treatment of rows of the data that can't be used."""

    error = "error"  # the run stops and names it
    skip = "skip"  # it is counted and left out


class LossName(Choice):
    """Loss of one pair; formulas and sources are in megadpo/loss/table.py."""

    sigmoid = "sigmoid"  # DPO; with label smoothing, cDPO
    robust = "robust"
    ipo = "ipo"
    hinge = "hinge"
    sigmoid_norm = "sigmoid_norm"
    exo_pair = "exo_pair"
    nca_pair = "nca_pair"
    bco_pair = "bco_pair"
    sppo_hard = "sppo_hard"
    apo_zero = "apo_zero"
    apo_down = "apo_down"
    discopop = "discopop"
    simpo = "simpo"
    orpo = "orpo"
    sft = "sft"  # NLL of the chosen responses


class FDivergence(Choice):
    """Divergence between policy and reference (f-DPO)."""

    reverse_kl = "reverse_kl"  # DPO's own
    forward_kl = "forward_kl"
    js = "js"  # Jensen-Shannon
    alpha = "alpha"  # between forward and reverse KL


class ReferenceMode(Choice):
    """Source of the reference's log-probs."""

    resident = "resident"  # a second frozen model beside the policy
    offload = "offload"  # its weights are in the host's memory, and on the device only for the reference's pass
    cached = "cached"  # computed once for each pair, and stored on disk
    none = "none"  # no reference, for losses that need none


class Dtype(Choice):
    """Number format of weights, activations and communication."""

    bf16 = "bf16"  # with fp32 main weights in the optimizer
    fp32 = "fp32"


class Backend(Choice):
    """Modules of the layers."""

    auto = "auto"  # transformer_engine where it can be used
    native = "native"  # Megatron-Core's own modules: on every device
    transformer_engine = "transformer_engine"  # norms, linears and activation of Transformer Engine: CUDA, bf16


class Fp8Recipe(Choice):
    """Values that share a scale in FP8 matrix products."""

    tensorwise = "tensorwise"  # a tensor, by its own largest value
    delayed = "delayed"  # a tensor, by its largest values in earlier steps
    blockwise = "blockwise"  # 128 values, 128 x 128 of weights: Hopper
    mxfp8 = "mxfp8"  # 32 values: Blackwell


class Fp8Backend(Choice):
    """Implementation of FP8 matrix products."""

    transformer_engine = "transformer_engine"  # NVIDIA's kernels
    emulate = "emulate"  # rounds the operands and computes in fp32, on any device: for numbers, not for speed


class Fp8Format(Choice):
    """Formats of FP8 operands."""

    hybrid = "hybrid"  # e4m3, gradients in e5m2
    e4m3 = "e4m3"


class AmaxAlgorithm(Choice):
    """Choice of the maximum, among those of earlier steps, from which delayed scaling computes its scale."""

    most_recent = "most_recent"
    max = "max"


class Schedule(Choice):
    """Shape of the learning rate after warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class TrackerName(Choice):
    """Destination of metrics."""

    jsonl = "jsonl"  # RUN_DIR/metrics.jsonl
    tensorboard = "tensorboard"  # RUN_DIR/tensorboard/
    wandb = "wandb"  # Weights & Biases, online or offline (WANDB_MODE); its files lie in RUN_DIR/wandb/


class DeviceKind(Choice):
    """Kind of the device that computes."""

    auto = "auto"  # CUDA where there is one
    cuda = "cuda"
    cpu = "cpu"


class RecomputeGranularity(Choice):
    """Activations of the layers that are recomputed in the backward instead of saved."""

    selective = "selective"  # those of `model.recompute_modules`
    full = "full"  # all: only the input of a layer, or of several, is saved


class RecomputeMethod(Choice):
    """Layers of a chunk that full recomputation applies to."""

    uniform = "uniform"  # all, `model.recompute_num_layers` together
    block = "block"  # the first `model.recompute_num_layers` one by one, the others not at all


class RecomputeModule(Choice):
    """A part of every layer."""

    core_attn = "core_attn"  # attention without its projections, rotary embedding included
    mlp = "mlp"  # both projections and the activation between them


class MomentDtype(Choice):
    """Number format of one of Adam's running means."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"  # with a scale per tensor
    fp8 = "fp8"  # e4m3, with a scale per tensor


class AttentionKernel(Choice):
    """Kernel of the attention layers."""

    auto = "auto"  # varlen where it can be used
    sdpa = "sdpa"  # torch's scaled-dot-product attention, one call per segment of the stream; on every device
    varlen = "varlen"  # torch's flash attention, one call per stream: CUDA, bf16, torch 2.10 or newer
    transformer_engine = "transformer_engine"  # cuDNN's fused attention, one call per stream: CUDA, bf16
