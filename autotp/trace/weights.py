"""Knows the ways in which the traced code gets at its parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(slots=True)
class Weights:
    """Knows how code gets at a parameter, by the id of the object that it gets.

    attributes: the object that `module.name` gives → the parameter's fake, its name there. objects: the parameter in the module's
    table, which `parameters()` and `state_dict` give, → a name. originals: the real parameter, which lists and closures hold, → the
    table and the name of the object that stands for it.
    """

    attributes: dict[int, tuple[Tensor, str]] = field(default_factory=dict)
    objects: dict[int, str] = field(default_factory=dict)
    originals: dict[int, tuple[dict[str, Any], str]] = field(default_factory=dict)
