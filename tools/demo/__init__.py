"""The demonstration: `world` (what the pairs say), `teach` (the starting policy), `judge` (before and after)."""
