"""megadpo: DPO on Megatron-Core, at any parallel layout, from a Hugging Face directory to a Hugging Face directory.

The map of the house, in the order in which a preference pair walks through it. A room imports rooms above it only.

    errors, rank_logging    the errors a user can act on; loggers that speak on rank 0
    cpus, cards             how many of them this process may use; what a GPU can do by its data sheet
    fp8_recipes             what FP8 recipes ask of tokens and features
    files                   text files replaced whole, and errors of writing that say what to do
    loss_table              the losses by name: formula, source, the keys that each reads
    config/                 schema (every key, its unit, range and default), validation, compose (Hydra and YAML)
    checkpoint_files        which checkpoint a path means, and what it says about itself
    model_source            where a run's starting weights come from: Hugging Face, or a checkpoint
    gloo                    collectives that gloo does slowly
    device                  the one file that says torch.cuda; lets Megatron-Core run on CPU
    parallel/               process groups of a layout, and the collectives of this project
    attention_plan          which key ranges each segment of a packed stream attends to
    flops                   what a pair costs, from true lengths
    logprobs                fused log-probabilities of response tokens
    loss_formulas, losses   each loss of a pair; mixes with their knobs, and what is logged
    metrics                 values and the reduction that each declares
    data/                   sources -> pairs -> token ids on disk -> microbatches -> packed batches
    models/                 Hugging Face configuration and weights <-> Megatron-Core model that returns log-probs
    forward_step            the one forward path of training, evaluation and reference
    optimizer, checkpoint   AdamW and its schedule; what a run needs to go on
    host_optimizer          Megatron's optimizer in the host's memory, mended
    export                  the Hugging Face directory that a run hands back
    planner/                memory, traffic, bubble and least time of a layout
    reference/              the reference's two numbers per pair, from a model or from a store
    train_step, evaluation  one update; the mean over a whole validation set
    margin_check            what FP8 does to the margins of a few pairs
    trackers, progress      where metrics are written; what a person sees of them
    trainer                 the loop: step, log, evaluate, save, stop
    compute                 what computes: formats, layers, kernels, FP8, by configuration and machine
    assembly, resume        a Config turned into all of the above; the checkpoint that a run goes on from
    datasets                the pairs of a run: tokenized once by rank 0, mapped by every rank
    reference_cache         the store of a reference's log-probs, completed by a model that then goes
    command_line, session   what the tools share: checks, exit statuses; a launch turned into groups and one Config
    run                     a whole run, from its configuration to the exported model
    planning, dry_run       a configuration's plan; a launch rehearsed up to its weights
    scoring, score_files    every pair's log-probs under a model, and the files that let a killed scoring go on
    score_summary           what they say of all pairs, and by length
    convert, verification   Hugging Face <-> checkpoints that stand alone, and the proof that both are one model

The command-line tools in tools/ stand on top of all of it.
"""

__version__ = "0.1.0"
