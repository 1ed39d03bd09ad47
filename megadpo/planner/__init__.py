"""Plans a layout before anything is loaded: memory, communication, the pipeline's bubble and the time of a step.

`plan` is exact in quantities that follow from shapes (parameters, gradients, saved activations), and an estimate in
those that depend on machines (times). Legend of names: T tokens of a microbatch's stream, H hidden size.
"""

from megadpo.planner.job import Cluster, Job, Layout, MemoryKnobs, PairLengths
from megadpo.planner.plan import Plan, make_plan

__all__ = ["Cluster", "Job", "Layout", "MemoryKnobs", "PairLengths", "Plan", "make_plan"]
