"""Inspection of preference data: statistics, decoding, and output (terminal, page)."""
