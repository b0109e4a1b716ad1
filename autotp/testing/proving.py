"""Checks the property that every drawn architecture must have, and says what an example is an example of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from enum import Enum

from autotp.plan.expressions import Concat, factors
from autotp.plan.plan import Plan
from autotp.testing.architectures.architecture import Architecture
from autotp.testing.equivalence.check import Equivalence, NotEquivalent
from autotp.testing.idioms.idioms import Idioms
from autotp.testing.idioms.lines import KINDS
from autotp.testing.outcome import further


class TrapSprung(NotEquivalent):
    """A dim was sharded that a planted trap forbids."""


def prove(
    architecture: Architecture, tp: int, *, steps: int = 3, backend: str = "local", timeout: float = 120.0, certificate: str = "numbers"
) -> Equivalence:
    """The model of `architecture` is the same over `tp` ranks: forward, backward, after `steps` steps and with other lengths; its trap is
    not sharded.

    Raises:
        NotEquivalent: it is not. TrapSprung: it is for these numbers, and sharded what it must not. AutoTPError: autotp refuses it.
    """
    result = further(architecture.build, architecture.inputs(), tp, {}, steps, backend, timeout, certificate)()
    for name, dim in architecture.kept():
        if result.plan.params[name].layout.dim == dim:
            raise TrapSprung(f"{name} is sharded along dim {dim}, where {architecture.trap.value} has no exact sharding\n{result.plan}")
    return result


def variants(architecture: Architecture) -> Iterator[str]:
    """Names the value of each field of the example that is a choice: `projection=latent`, `tied`."""
    for each in fields(architecture):
        value = getattr(architecture, each.name)
        if isinstance(value, Enum):
            yield f"{each.name}={value.value}"
        elif isinstance(value, bool):
            yield f"{each.name}={value}"
    yield from (f"extra={extra.value}" for extra in architecture.extras)
    heads = "mqa" if architecture.kv == 1 < architecture.group else "gqa" if architecture.group > 1 else "mha"
    yield f"heads={heads}"
    yield f"activation={architecture.activation}"


def traits(idioms: Idioms) -> Iterator[str]:
    """Names the value of each idiom in the example: `call=twice`, `around=gate`, `line=index`."""
    for each in fields(idioms):
        value = getattr(idioms, each.name)
        if isinstance(value, Enum):
            yield f"{each.name}={value.value}"
    yield from (f"around={around.value}" for around in idioms.around)
    yield from {f"line={kind}" for kind, table in KINDS.items() if set(idioms.lines) & set(table)}


def features(plan: Plan) -> Iterator[str]:
    """Which kinds of layouts and collectives a plan has."""
    layouts = [p.layout for p in plan.params.values()]
    cut = [f for x in layouts for expr in x.dims for f in factors(expr) if f.sharded]
    found = {
        "sharded": bool(cut),
        "padded": any(x.is_padded for x in layouts),
        "shared rows": any(x.is_shared for x in layouts),
        "cut in pieces": any(f.pieces > 1 for f in cut),
        "fused": any(isinstance(e, Concat) for x in layouts for e in x.dims),
        "joint sum": any(m.joint for m in plan.modules),
        "local attribute": any(m.attributes for m in plan.modules),
        "distributed call": any(m.changed for m in plan.modules),
        "nothing replicated": not plan.replicated_products,
    }
    yield from (name for name, there in found.items() if there)
