"""Recipes, which are descriptions without a computation."""

from . import recipe

__all__ = ["recipe"]
