"""Process groups and the few collectives that are ours; the only reader of Megatron's parallel_state."""
