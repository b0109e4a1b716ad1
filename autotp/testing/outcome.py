"""Checks that autotp gives equal numbers for a model, or refuses it.

autotp refuses a model by an error of its own: from planning, or from the first call that the plan was not made for. Other numbers,
an error of torch's and a hang are failures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from autotp.errors import AutoTPError
from autotp.testing.equivalence.check import Equivalence, NotEquivalent, check
from autotp.testing.equivalence.observe import Training, adamw, observe_model
from autotp.testing.equivalence.subject import Changes, Inputs, make_subject, with_one_row_more


@dataclass(frozen=True, slots=True)
class Outcome:
    """`equal` is the comparison; None where autotp refused the model with the error `refused` (its type and text)."""

    equal: Equivalence | None
    refused: str = ""

    @property
    def sharded(self) -> bool:
        """True where the model is equal and each rank holds less than all of it."""
        return self.equal is not None and self.equal.plan.local_share < 1

    def __str__(self) -> str:
        if self.equal is None:
            return f"refused: {self.refused}"
        return f"equal, {self.equal.plan.local_share:.2f} of it on each rank"


def equal_or_refused(
    factory: Callable[[], nn.Module],
    *,
    inputs: Inputs,
    tp: int,
    more: Mapping[str, Changes] | None = None,
    steps: int = 0,
    backend: str = "local",
    timeout: float = 120.0,
    certificate: str = "numbers",
) -> Outcome:
    """Check that the model over `tp` ranks equals the model on one device, or that autotp refuses it.

    Args:
        factory, inputs, tp, steps, backend, timeout, certificate: as for `assert_equivalent`; autotp plans with `inputs`.
        more: further calls after planning, which the plan has not seen: changes to the arguments, by name.
            One more has a row more, and a token less.

    Raises:
        NotEquivalent: neither. InputError: the model itself does not run on these inputs.
    """
    compare = further(factory, inputs, tp, more or {}, steps, backend, timeout, certificate)
    try:
        return Outcome(compare())
    except NotEquivalent:
        raise
    except AutoTPError as error:
        return Outcome(None, f"{type(error).__name__}: {error}")


def further(
    factory: Callable[[], nn.Module],
    inputs: Inputs,
    tp: int,
    more: Mapping[str, Changes],
    steps: int,
    backend: str,
    timeout: float,
    certificate: str,
) -> Callable[[], Equivalence]:
    """Returns a function that compares as `assert_equivalent` does, with calls of other arguments too: see `equal_or_refused`.

    Raises:
        InputError: the model itself does not run on these inputs.
    """
    with torch.random.fork_rng(devices=()):
        subject = with_one_row_more(make_subject(factory, inputs, torch.float64, 0, more))
        training = Training(steps, adamw)
        wanted = observe_model(subject, training)
    return partial(check, subject, wanted, training, tp, backend, timeout, certificate=certificate)
