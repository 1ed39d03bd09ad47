"""The demonstration: `corpus` (what the pairs say), `pretrain` (the starting policy), `measure` (before and after)."""
