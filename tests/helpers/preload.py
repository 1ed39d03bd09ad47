"""Imports what every rank of a test needs; the fork server loads this once. It runs nothing."""

import megadpo.commands.train
import tests.helpers.jobs.training

__all__ = ["megadpo", "tests"]
