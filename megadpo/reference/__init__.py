"""The reference: two numbers per pair. Every way to have them answers one call, `Reference.log_probs`."""

from megadpo.reference.interface import Reference
from megadpo.reference.resident import ResidentReference

__all__ = ["Reference", "ResidentReference"]
