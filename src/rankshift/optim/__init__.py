"""How a gradient becomes a step: transforms, and the one torch optimizer that runs them."""

from rankshift.optim.adam import Adam
from rankshift.optim.project import Clock, Project
from rankshift.optim.transform import Hyper, Optimizer, Transform

__all__ = ["Adam", "Clock", "Hyper", "Optimizer", "Project", "Transform"]
