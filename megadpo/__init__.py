"""megadpo: DPO on Megatron-Core, at any parallel layout, from a Hugging Face directory to a Hugging Face directory.

The map of the package, from the ground up:

    errors          errors that a user can act on, and the secrets kept out of them
    runtime/        device, Megatron on CPU, ranks and process groups, collectives, files, log, progress bar
    loss/           from logits to one number per pair: log-probs, the table of losses, formulas, mixes; torch only
    metrics/        values with declared reductions, FLOPs, trackers
    models/         config.json -> Megatron model that returns log-probs; conversion/ for weights, both directions
    data/           sources -> pairs -> token ids on disk -> microbatches -> packed batches
    forward_step    the one forward path of policy, reference, evaluation and scoring
    reference/      two numbers per pair: resident, offloaded, cached, none
    optimizer/      AdamW in Megatron's DDP, its schedule, its states on the host and in checkpoints, guarded updates
    checkpoint/     contents of a checkpoint; writing beside the training, naming, verifying, removing, loading
    health/         monitors of a run: hints on its metrics, slow ranks, hung ranks, ranks that disagree
    train/          one update, the loop around it, evaluation, its log, skipped steps, requests to stop
    planner/        memory, traffic and least time of a layout, before a GPU is paid for
    config/         every key, its choices and rules, Hydra and YAML
    setup/          a Config turned into all of the above
    commands/       the programs behind the command lines of tools/

A room imports rooms of lower floors only; tests/unit/test_architecture.py holds these floors:

    tools > commands > setup > config > planner, train > checkpoint, reference > forward_step > data, health
          > models > optimizer, metrics > runtime, loss > errors

So no room below config/ can see a Config: setup/ turns it into plain arguments. A table of names lives with the code
it describes (loss/table.py, models/fp8_recipes.py, runtime/gpus.py), and config/ reads those tables.
docs/architecture.md follows a run and a step through the rooms.
"""

__version__ = "0.1.0"
