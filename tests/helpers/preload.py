"""Imports what every rank of a test needs; the fork server loads this once, and computes nothing."""

import gc

import megadpo.commands.train
import tests.helpers.jobs.training

__all__ = ["megadpo", "tests"]

# A collection in a forked rank would visit all that was imported, and copy the memory pages of it: a second a rank.
gc.collect()
gc.freeze()
