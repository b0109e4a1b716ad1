"""The checks of `autotp.testing` on the gloo ranks of a pool, which are there already: nothing is started and no model is sent.

Every rank builds the model, observes it on its own, parallelizes a copy and hands what it found to all others, so that each of them
comes to the verdict of `autotp.testing.equivalence.check`. Factories, inputs and contexts are picklable by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from autotp.errors import AutoTPError, InputError
from autotp.testing import Equivalence
from autotp.testing.equivalence.check import check
from autotp.testing.equivalence.observe import MakeOptimizer, Training, observe_model
from autotp.testing.equivalence.subject import Inputs, make_subject, twin, with_one_row_more
from autotp.testing.ranks.run import Running
from tests.support.ranks import Pool

#: What must be compared of a causal language model, of an encoder and of one that has neither masks nor labels, see `require`.
CAUSAL = ("state", "outputs", "with padding", "with hidden states", "loss", "gradients", "generation", "steps")
ENCODER = ("state", "outputs", "with padding", "with hidden states", "gradients", "steps")
PLAIN = ("state", "outputs", "gradients", "steps")


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """A step in proportion to the gradient, which AdamW hides."""
    return torch.optim.SGD(parameters, lr=0.1)


def compare(
    factory: Callable[[], nn.Module],
    inputs: Inputs | None = None,
    *,
    recipe: Any = None,
    optimizer: MakeOptimizer = sgd,
    told: bool = True,
    again: Callable[[nn.Module], nn.Module] = twin,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    certificate: str = "graph",  # parallelize's own check of numbers would hide what the rules get wrong
) -> Equivalence:
    """As `equivalent`, on one rank; every rank must call it.

    Raises:
        NotEquivalent, AutoTPError: as for `assert_equivalent`.
    """
    training = Training(1, optimizer, least=0.0 if optimizer is sgd else 0.01)
    try:
        subject = make_subject(factory, inputs, torch.float64, 0)
    except InputError as error:
        if "dtype=torch.float32 may help" not in str(error):
            raise
        subject = make_subject(factory, inputs, torch.float32, 0)
    if inputs is not None:
        subject = with_one_row_more(subject)
    subject = replace(subject, given=subject.given and told, again=again)
    wanted = observe_model(subject, training)
    with around():
        return check(subject, wanted, training, dist.get_world_size(), Running("gloo", _here), recipe=recipe, certificate=certificate)


def equivalent(
    pool: Pool, factory: Callable[[], nn.Module], inputs: Inputs | None = None, *, tp: int = 2, needs: Iterable[str] = (), **options: Any
) -> Equivalence:
    """`assert_equivalent` on `tp` ranks of `pool`, with one optimizer step, in float64, or float32 where the model has no float64.

    Args:
        pool: the session's worker processes.
        factory, inputs: as for `assert_equivalent`.
        tp: number of ranks.
        needs: what must really be compared, see `require`.
        options: those of `compare`. recipe, optimizer: as for `assert_equivalent`. told: whether `parallelize` gets the inputs.
            again: makes the same model once more, where a deep copy does not. around: a context for parallelize and the comparison.
            certificate: `check` of `parallelize`.

    Raises:
        NotEquivalent, AutoTPError: as for `assert_equivalent`. RankError: a rank raised another error, died or hung.
    """
    found = pool.run(_told, factory, inputs, world=tp, **options)
    for result in found:
        if isinstance(result, AutoTPError):
            raise result
    require(found[0], *needs)
    return found[0]  # type: ignore[no-any-return]


def require(found: Equivalence, *needs: str) -> None:
    """Each of `needs` was compared: an aspect ("steps"), a further call ("with padding"), or an output ("loss").

    Raises:
        AssertionError: names those that were not, with the reason.
    """
    outputs = found.aspects["outputs"].paths
    missing = [n for n in needs if n not in found.aspects and n not in outputs and not any(path.endswith(f" {n}") for path in outputs)]
    assert not missing, "\n".join(f"{n}: was not compared ({found.skipped.get(n, 'not among the outputs')})" for n in missing)


def _told(*args: Any, **options: Any) -> Equivalence | AutoTPError:
    try:
        return compare(*args, **options)
    except AutoTPError as error:
        return error


def _here(function: Callable[[Any], Any], job: Any, world: int, timeout: float) -> list[Any]:
    found: list[Any] = [None] * world
    dist.all_gather_object(found, function(job))
    return found
