"""Operators that have a distributed form: what a rule may ask of the run time."""

from __future__ import annotations

from enum import Enum


class Kernel(Enum):
    """An operator that needs a distributed form of its own when it runs on shards."""

    LOOKUP = "lookup"  # embedding rows sharded: ids outside the rank's rows give zeros; the result is P
    MEAN = "mean"  # mean over a sharded dim: the local mean / tp is P
    RMS_NORM = "rms_norm"  # normalised dim sharded: mean square all-reduced
    LAYER_NORM = "layer_norm"  # normalised dim sharded: mean and variance all-reduced
    VAR = "var"  # var/std over a sharded dim
    VECTOR_NORM = "vector_norm"  # 2-norm over a sharded dim
