"""Every error that autotp raises on purpose is an `AutoTPError`.

A message names the mistake, its place (module path or argument), the value found, the value wanted, and the next step.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType


def sentence(text: object) -> str:
    """The text of an error, of whichever library, with one full stop."""
    return f"{str(text).rstrip().rstrip('.')}."


class AutoTPError(RuntimeError):
    """autotp raises a subclass of this error for bad input and for a model that it cannot handle."""


class MeshError(AutoTPError):
    """The mesh or the process group does not fit the request."""


class TraceError(AutoTPError):
    """The model could not be run on fake tensors. The message names the module, the operator and the ways out.

    `partial` is the graph recorded until then, `module` the path of the module that failed. `calls` is the traceback down to it; that
    of the cause goes on from there.
    """

    partial: object = None
    module: str = ""
    calls: TracebackType | None = None


class ChangedError(AutoTPError):
    """The model is no longer what its plan was made for: a module, a setting or a tensor was changed after `parallelize`."""


class LostRankError(AutoTPError):
    """Another rank did not come to a collective within its group's timeout, or is gone."""


class InputError(AutoTPError):
    """An argument of a public entry point has the wrong type or value."""


class PlanError(AutoTPError):
    """No plan satisfies the request (for example `strict=True` with replicated parameters), or the model is parallel already or not yet."""


class CheckpointError(AutoTPError):
    """A checkpoint cannot be read or written, or does not fit its model. The message names the file or the tensor."""


class RecipeError(AutoTPError):
    """A recipe cannot be read, or does not fit its model. `problems` lists every mistake, a line each."""

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(dict.fromkeys(problems))
        super().__init__("\n".join(self.problems))
