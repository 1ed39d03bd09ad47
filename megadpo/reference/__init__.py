"""The reference: two numbers per pair. All its modes implement one call, `Reference.log_probs`."""

from megadpo.reference.cached import CachedReference
from megadpo.reference.interface import Reference
from megadpo.reference.none import NoReference
from megadpo.reference.offload import OffloadedReference
from megadpo.reference.resident import ResidentReference

__all__ = ["CachedReference", "NoReference", "OffloadedReference", "Reference", "ResidentReference"]
