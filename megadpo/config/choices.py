"""The values of configuration keys that take one of a few names."""

from __future__ import annotations

from enum import Enum


class Choice(str, Enum):
    """One of a few names; equal to its YAML text (`Dtype.bf16 == "bf16"`), which is also how it prints."""

    def __str__(self) -> str:
        return str(self.value)


class Truncation(Choice):
    """What happens to a pair longer than `data.max_length`."""

    keep_start = "keep_start"  # responses are cut at the end; a prompt that fills max_length alone drops its pair
    keep_end = "keep_end"  # the prompt loses its beginning, once per pair, by what the longer response needs
    drop = "drop"  # the pair is dropped and counted
    error = "error"  # the run stops at the first one


class ResumeChange(Choice):
    """What a continuation may change of a run once it is said that it is meant."""

    data = "data"  # other pairs, tokenizer or template: they are begun with their first epoch
    batch_size = "batch_size"  # train.global_batch_size; the run goes on behind the last pair it has seen
    loss = "loss"  # keys of loss.
    reference = "reference"  # its weights, where they do not follow the policy, or whether there is one


class OnError(Choice):
    """What happens to a row of the data that cannot be used."""

    error = "error"  # the run stops and names it
    skip = "skip"  # it is counted and left out


class LossName(Choice):
    """Loss of one pair; formulas and sources in `loss_table.py`."""

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
    """What holds the policy to the reference (f-DPO)."""

    reverse_kl = "reverse_kl"  # DPO's own
    forward_kl = "forward_kl"
    js = "js"  # Jensen-Shannon
    alpha = "alpha"  # between forward and reverse KL


class ReferenceMode(Choice):
    """How the reference model's log-probs are had."""

    resident = "resident"  # a second frozen model beside the policy
    offload = "offload"  # its weights wait in the host's memory, and are on the device for the reference's pass only
    cached = "cached"  # computed once for each pair, and kept on disk
    none = "none"  # there is none: for losses that need none


class Dtype(Choice):
    """Number format of weights, activations and communication."""

    bf16 = "bf16"  # with fp32 main weights in the optimizer
    fp32 = "fp32"


class Backend(Choice):
    """What the layers are made of."""

    auto = "auto"  # transformer_engine where it can serve
    native = "native"  # Megatron-Core's own modules: on every device
    transformer_engine = "transformer_engine"  # norms, linears and activation of Transformer Engine: CUDA, bf16


class Fp8Recipe(Choice):
    """What shares a scale in FP8 matrix products."""

    tensorwise = "tensorwise"  # a tensor, by its own largest value
    delayed = "delayed"  # a tensor, by its largest values in earlier steps
    blockwise = "blockwise"  # 128 values, 128 x 128 of weights: Hopper
    mxfp8 = "mxfp8"  # 32 values: Blackwell


class Fp8Backend(Choice):
    """What computes FP8 matrix products."""

    transformer_engine = "transformer_engine"  # NVIDIA's kernels
    emulate = "emulate"  # rounds the operands and computes in fp32, on any device: for numbers, not for speed


class Fp8Format(Choice):
    """Formats of FP8 operands."""

    hybrid = "hybrid"  # e4m3, gradients in e5m2
    e4m3 = "e4m3"


class AmaxAlgorithm(Choice):
    """What delayed scaling makes of the largest values it has kept."""

    most_recent = "most_recent"
    max = "max"


class Schedule(Choice):
    """Shape of the learning rate after warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class TrackerName(Choice):
    """Where metrics are written."""

    jsonl = "jsonl"  # RUN_DIR/metrics.jsonl
    tensorboard = "tensorboard"  # RUN_DIR/tensorboard/
    wandb = "wandb"  # Weights & Biases, online or offline (WANDB_MODE); its files lie in RUN_DIR/wandb/


class DeviceKind(Choice):
    """What computes."""

    auto = "auto"  # CUDA where there is one
    cuda = "cuda"
    cpu = "cpu"


class RecomputeGranularity(Choice):
    """Which activations of the layers the backward computes again instead of keeping them."""

    selective = "selective"  # those of `model.recompute_modules`
    full = "full"  # all: a layer, or several, keep their input alone


class RecomputeMethod(Choice):
    """Which layers of a chunk full recomputation takes."""

    uniform = "uniform"  # all, `model.recompute_num_layers` together
    block = "block"  # the first `model.recompute_num_layers` one by one, the others not at all


class RecomputeModule(Choice):
    """A part of every layer."""

    core_attn = "core_attn"  # attention without its projections, rotary embedding included
    mlp = "mlp"  # both projections and the activation between them


class MomentDtype(Choice):
    """Number format in which one of Adam's running means is kept."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"  # with a scale per tensor
    fp8 = "fp8"  # e4m3, with a scale per tensor


class AttentionKernel(Choice):
    """What computes attention."""

    auto = "auto"  # varlen where it can serve
    sdpa = "sdpa"  # torch's scaled-dot-product attention, one call per segment of the stream; on every device
    varlen = "varlen"  # torch's flash attention, one call per stream: CUDA, bf16, torch 2.10 or newer
    transformer_engine = "transformer_engine"  # cuDNN's fused attention, one call per stream: CUDA, bf16
