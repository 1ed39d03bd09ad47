"""All configuration keys: type, unit, range, and the reason for the default. The only place that defines defaults.

One dataclass per group of keys; `Config` holds them. A key only exists if setting it changes what the program does.
Ranges and rules between keys are checked in `validation.py`, types in `compose.py`, which builds these from YAML. Lists
accept a bare value for a list of one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megadpo.config.choices import (
    AmaxAlgorithm,
    AttentionKernel,
    Backend,
    DeviceKind,
    Dtype,
    FDivergence,
    Fp8Backend,
    Fp8Format,
    Fp8Recipe,
    LossName,
    MomentDtype,
    OnError,
    RecomputeGranularity,
    RecomputeMethod,
    RecomputeModule,
    ReferenceMode,
    ResumeChange,
    Schedule,
    TrackerName,
    Truncation,
)


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The model to train."""

    name: str
    """Name in the run directory and the model card; set by the file of conf/model/ that is chosen with +model=NAME.

    With +model=hf it becomes the name of the model's directory when a run starts.
    """

    hf_path: str | None = None
    """Hugging Face directory (config.json, tokenizer, safetensors) of the starting weights; or give `checkpoint`."""

    checkpoint: str | None = None
    """Megatron checkpoint to start from instead: an imported one, one step of a run, or a run (its latest step)."""

    shape: dict[str, Any] | None = None
    """Fields of config.json that fix the architecture, set by named models; the weights must have it. Null: any."""

    logits_mib: int = 128
    """Memory for logits in MiB, >= 1: the output layer takes as many response rows at a time as fit, at least one.

    The default lets matrix products run at full speed; with a large hidden size on a GPU more may be faster.
    """

    recompute_granularity: RecomputeGranularity | None = None
    """Computes activations again in the backward instead of keeping them. Null: keep all, the fastest."""

    recompute_method: RecomputeMethod | None = None
    """Layers that are recomputed, with full recomputation only. Null: uniform."""

    recompute_num_layers: int | None = None
    """Layers of `recompute_method`, >= 1, counted in each model chunk; full only. Null: 1."""

    recompute_modules: list[RecomputeModule] | None = None
    """Parts of the layers, with selective recomputation only. Null: [core_attn], as in Megatron."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """The preference pairs."""

    train_path: list[str]
    """Source of pairs, or several that are concatenated in this order.

    A .json, .jsonl, .parquet or .csv file, DIR:SPLIT of a saved dataset, or hf://OWNER/NAME:SPLIT; see docs/data.md.
    """

    validation_path: str | dict[str, str] | None = None
    """Validation source, or NAME: source for several sets, logged as eval/NAME/*. Null: no validation source."""

    validation_fraction: float = 0.0
    """Share of the training pairs held out for validation instead, in [0, 1); the split is deterministic. 0: none."""

    prompt_key: str = "prompt"
    """Field of a record that holds the prompt. The names of TRL and of most published preference sets."""

    chosen_key: str = "chosen"
    """Field that holds the preferred response."""

    rejected_key: str = "rejected"
    """Field that holds the other response."""

    max_length: int = 2048
    """Tokens of the prompt plus one response, >= 2. Holds most chat data; memory grows with it."""

    truncation: Truncation = Truncation.keep_start
    """Treatment of longer pairs. The default is TRL's rule, so that runs compare."""

    on_error: OnError = OnError.error
    """Treatment of rows that can't be used. Stopping is the default: a mistake in the data is seldom alone."""

    template_date: str | None = None
    """YYYY-MM-DD that chat templates receive as today's date. Null: the day of the first start, kept on resuming."""

    cache_dir: str | None = None
    """Directory of tokenized pairs found by content; all ranks must see it, runs may share it. Null: RUN_DIR/tokens."""

    workers: int | None = None
    """Processes that tokenize large sets, >= 1. Null: one for each CPU of rank 0's machine, at most 32."""

    share_prompt: bool = True
    """Put a pair's prompt through the model once, for both responses: exact, and cheaper wherever prompts are long."""

    tokens_per_microbatch: int = 8192
    """Token budget of one packed stream, >= 1. More fills the device better and takes more activation memory."""

    def validation_files(self) -> dict[str, str]:
        """File of each validation set by name; a single unnamed set has the name "", no validation file gives {}."""
        if self.validation_path is None:
            return {}
        return {"": self.validation_path} if isinstance(self.validation_path, str) else dict(self.validation_path)


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """The layout; the data-parallel size is the world size / (tensor x pipeline)."""

    tensor: int = 1
    """Ranks that share each weight matrix, >= 1; keep them inside one machine."""

    pipeline: int = 1
    """Stages that the layers are cut into, >= 1."""

    virtual_pipeline: int | None = None
    """Model chunks per stage (interleaved schedule), >= 2: a smaller bubble for more messages. Null: one chunk."""

    sequence_parallel: bool | None = None
    """Share norms and dropout activations over the tensor ranks. Null: true when tensor > 1, as it only saves there."""

    num_layers_in_first_pipeline_stage: int | None = None
    """Layers of the first stage (all its chunks), >= 1; the other stages share the rest evenly. Null: as the others."""

    num_layers_in_last_pipeline_stage: int | None = None
    """Layers of the last stage, which has the head to compute as well, >= 1. Null: as the others."""

    overlap_grad_reduce: bool = False
    """Sum gradients over the data-parallel ranks while the backward still computes others: time, not memory."""

    overlap_param_gather: bool = False
    """Gather updated weights while the next forward computes, layer by layer; needs overlap_grad_reduce."""

    bucket_size: int | None = None
    """Parameters exchanged at a time, >= 1, with overlap_grad_reduce. Null: 40 million, or a million a data rank."""

    grad_reduce_in_fp32: bool = True
    """Add up and exchange gradients in fp32. False: in the weights' format, 2 bytes less a parameter, and rounding."""

    def uses_sequence_parallelism(self) -> bool:
        """True if sequence parallelism is on, by its key or by its default."""
        return self.tensor > 1 if self.sequence_parallel is None else self.sequence_parallel

    timeout_s: float = 1800.0
    """Seconds without progress on any rank, > 0, after which the run ends and logs the position of every rank.

    Must exceed the time of an update and of copying a checkpoint to the host. A save may take longer as long as its
    files grow; data still in the system's write cache at that point must reach the disk within this time.
    """


@dataclass(kw_only=True, slots=True)
class LossConfig:
    """The loss of a pair. docs/numerics.md lists the keys that each loss reads; others must keep their defaults."""

    name: list[LossName] = field(default_factory=lambda: [LossName.sigmoid])
    """The loss, or several that are added up. Sigmoid is DPO as published."""

    weights: list[float] | None = None
    """Weight of each loss of `name` in the sum, > 0. Null: 1 each, as in TRL."""

    beta: float = 0.1
    """Strength of the pull towards the reference (per nat), > 0. The value of the DPO paper and of TRL.

    SimPO's paper uses 2 and more. With ORPO it is the weight of the odds ratio, lambda in its paper.
    """

    label_smoothing: float = 0.0
    """Assumed probability that a preference is flipped, in [0, 0.5). 0: labels are trusted. exo_pair needs one."""

    ipo_length_normalize: bool = True
    """Divide IPO's log-ratios by the response length, as TRL does; false is the form of the paper. IPO only."""

    discopop_tau: float = 0.05
    """Temperature of DiscoPOP's blend, > 0. The paper's value."""

    simpo_gamma: float = 0.5
    """Reward margin that SimPO aims at, >= 0. TRL's value; the paper's are between 0.3 and 1.6."""

    f_divergence: FDivergence = FDivergence.reverse_kl
    """Divergence from the reference. Reverse KL is DPO's own."""

    f_alpha_divergence_coef: float = 0.5
    """The alpha of f_divergence=alpha, in (0, 1): 0 would be forward KL, 1 reverse KL. TRL's value."""

    ld_alpha: float | None = None
    """Weight of tokens beyond the length of a pair's shorter response, in [0, 1) (LD-DPO). Null: 1, as all others."""


@dataclass(kw_only=True, slots=True)
class ReferenceConfig:
    """The model whose log-probs the policy is compared with."""

    mode: ReferenceMode = ReferenceMode.resident
    """Source of the reference's log-probs; see docs/reference.md. Resident, because it needs nothing but memory."""

    hf_path: str | None = None
    """Hugging Face directory of the reference. Null: the starting policy, as DPO defines it."""

    cache_dir: str | None = None
    """Directory of log-probs, cached only; runs and jobs may share one. Null: RUN_DIR/reference."""

    sync_every: int | None = None
    """Updates after which policy is mixed into the reference, >= 1 (TR-DPO); resident and offload. Null: never."""

    sync_mix: float = 0.6
    """The policy's share of that mixture, in (0, 1]; with sync_every. TRL's default."""


@dataclass(kw_only=True, slots=True)
class PrecisionConfig:
    """Number formats."""

    dtype: Dtype = Dtype.bf16
    """Format of weights and activations. bf16 is what published checkpoints are in; fp32 is for exact comparisons."""

    backend: Backend = Backend.auto
    """Modules of the layers. auto is settled when a run starts: its config.yaml holds what was chosen."""

    fp8: Fp8Recipe | None = None
    """Recipe that quantises the layers' matrix products, of policy and reference alike; see docs/fp8.md. Null: none.

    `delayed`, and with it the two keys about its history, needs a run without a reference (reference.mode=none).
    A recipe defines which values share a scale.
    """

    fp8_backend: Fp8Backend = Fp8Backend.transformer_engine
    """Kernels, or an emulation that shows on any device what a recipe does to the numbers."""

    fp8_format: Fp8Format | None = None
    """Formats of the operands. Null: hybrid where a whole tensor has one scale, e4m3 with blocks."""

    fp8_amax_history_len: int = 1
    """Steps whose largest values delayed scaling keeps, >= 1; delayed only. Megatron's default."""

    fp8_amax_compute_algo: AmaxAlgorithm = AmaxAlgorithm.most_recent
    """Choice of the value that gives the scale; delayed only. Megatron's default."""

    num_layers_at_start_in_bf16: int = 0
    """First layers that are not quantised, >= 0; at most as many as a pipeline stage has."""

    num_layers_at_end_in_bf16: int = 0
    """Last layers that are not quantised, >= 0; at most as many as a pipeline stage has."""

    fp8_check_every: int | None = None
    """Updates between checks of what FP8 does to some pairs' margins, >= 1; also before the first. Null: none."""

    fp8_check_pairs: int = 8
    """Training pairs that a check scores with and without FP8, always the first ones, >= 1. Four forward passes."""


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay (none on norms and biases), and the learning rate over steps."""

    lr: float = 1e-6
    """Peak learning rate, >= 0. DPO moves an already tuned model: ten to a hundred times below fine-tuning."""

    min_lr: float = 0.0
    """Learning rate at the end of a linear or cosine schedule, in [0, lr]."""

    schedule: Schedule = Schedule.linear
    """Decay after warm-up; update k (from 1) uses the schedule at k - 1, as TRL does."""

    warmup_steps: int = 0
    """Updates over which the rate rises linearly from 0, >= 0."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's two running means, each in [0, 1)."""

    eps: float = 1e-8
    """Added to Adam's denominator, > 0."""

    weight_decay: float = 0.0
    """Decoupled decay per unit of learning rate, >= 0. The reference already holds the weights back."""

    clip_grad: float = 1.0
    """Largest global L2 norm of the gradient, >= 0. 0: no clipping."""

    precision_aware: bool = False
    """Leave main weights and moments to Transformer Engine's FusedAdam, which keeps moments in the formats below."""

    exp_avg_dtype: MomentDtype = MomentDtype.fp32
    """Format of the running mean of gradients, with precision_aware."""

    exp_avg_sq_dtype: MomentDtype = MomentDtype.fp32
    """Format of the running mean of squared gradients, with precision_aware."""

    cpu_offload: bool = False
    """Keep main weights and moments in the host's memory and update there: 12 bytes a parameter for a slower step."""

    offload_fraction: float = 1.0
    """Share of the parameters that cpu_offload takes, in (0, 1]."""

    overlap_cpu_optimizer_d2h_h2d: bool = False
    """With cpu_offload, copy gradients and weights of some parameters while others are updated."""


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """The run."""

    global_batch_size: int = 64
    """Preference pairs per update over all ranks, >= 1."""

    max_steps: int | None = None
    """Updates to make, >= 1; wins over epochs. Null: as many as `epochs` takes."""

    epochs: int = 1
    """Passes over the training pairs, >= 1. DPO overfits quickly."""

    seed: int = 0
    """Seed of the data order and of the validation split, in [0, 2**32)."""

    shuffle: bool = True
    """Permute the pairs each epoch by (seed, epoch). False: file order."""

    log_every: int = 1
    """Updates between lines of metrics, >= 1."""

    log_token_statistics: bool = False
    """Log the policy's entropy and mean_token_accuracy too, TRL's names. Off: it costs a little of each step."""

    eval_every: int | None = None
    """Updates between evaluations, >= 1. Null: before the first update and at the end only."""

    save_every: int | None = None
    """Updates between checkpoints, >= 1. Null: at the end only."""

    max_bad_steps: int = 3
    """Skipped updates in a row, >= 1, after which the run saves and stops. Updates that are not finite are skipped."""

    check_ranks_every: int | None = 100
    """Updates between comparisons of weights that ranks share, >= 1; also at start and before saving. Null: never."""

    max_hours: float | None = None
    """Hours, > 0, after which a launch saves and ends with status 75, ready to be resumed. Null: no limit.

    They count from the start of torchrun on rank 0's machine, including restarts of its ranks. It stops while another
    round as long as the longest so far (an update, with an evaluation if one was due) and a save still fit in.
    """

    run_dir: str | None = None
    """Directory of everything the run writes. Null: outputs/DATE_TIME-MODEL, chosen when the run starts."""

    dry_run: bool = False
    """Take the launch through settings, data and schedule to a plan of its memory, and stop before any weights."""

    resume: str = "never"
    """auto: newest valid checkpoint of run_dir, or a fresh start; never: run_dir must be empty; or a directory."""

    resume_changes: list[ResumeChange] = field(default_factory=list)
    """Differences from the resumed run that are intended; any other such difference is refused."""


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """Checkpoints of a run."""

    keep_last: int = 2
    """Newest checkpoints kept, >= 1. Two, so that an intact one is left when the newest turns out to be damaged."""

    keep_every: int | None = None
    """Checkpoints of steps that this divides are kept as well, >= 1. Null: none."""

    keep_best: str | None = None
    """Metric of evaluations, as eval/loss or eval/rewards/accuracies: the best one's checkpoint is kept as well.

    A checkpoint saved by a stop is judged only if an evaluation was due, after the resumed run has made it.
    """

    async_save: bool = True
    """Train on while a checkpoint is written, from a copy in the host's memory. False: wait for it."""


@dataclass(kw_only=True, slots=True)
class DeviceConfig:
    """The device and its attention kernel."""

    kind: DeviceKind = DeviceKind.auto
    """auto takes CUDA where there is one."""

    attention: AttentionKernel = AttentionKernel.auto
    """Kernel of the attention layers. auto takes varlen where it can serve, sdpa elsewhere, and logs which."""


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """The machines that are planned for; only tools/plan.py and train.dry_run read it."""

    gpus: int | None = None
    """Total number of cards, >= 1; tools/plan.py requires it, a dry run counts its own ranks."""

    gpu: str | None = None
    """Kind of GPU: a name in megadpo/runtime/gpus.py, or another with memory_gib. Null: the one a dry run is on."""

    gpus_per_node: int | None = None
    """Cards connected by NVLink, >= 1: those of one machine. Null: 8, in a dry run the ranks of rank 0's machine."""

    memory_gib: float | None = None
    """Memory of a card in GiB, > 0. Null: in a dry run on CUDA the device's, else the table's."""

    network_gb_per_s: float | None = None
    """Network bandwidth per card in one direction, in 10**9 bytes a second, > 0. Null: the table's."""


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """Lengths of pairs that tools/plan.py assumes where no data are given."""

    prompt_tokens: int | None = None
    """Tokens of every prompt, >= 1. Null: a quarter of data.max_length."""

    response_tokens: int | None = None
    """Tokens of every response, >= 1. Null: a quarter of data.max_length."""


@dataclass(kw_only=True, slots=True)
class Config:
    """The whole configuration of a run."""

    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    trackers: list[TrackerName] = field(default_factory=lambda: [TrackerName.jsonl, TrackerName.tensorboard])
    """Destinations of metrics; jsonl is always among them, because reports and resuming read it."""
    device: DeviceConfig = field(default_factory=DeviceConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)


def show(value: object) -> str:
    """Formats a value as it would be written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(show(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {show(item)}" for key, item in value.items()) + "}"
    return str(value)
