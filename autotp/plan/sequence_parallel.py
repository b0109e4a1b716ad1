"""Leaves the hidden states between regions of a plan in token parts: a region's sum is scattered over tokens, and the next one gathers.

The plan that is proven sums them whole. Hidden states in parts give every operator the same values, so the proof holds
(`autotp.rewrite.sequence`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Literal, TypeVar

from autotp.plan.conversions import CollectiveKind, Conversion, Op, When
from autotp.plan.spec import ModulePlan, PlanSpec, Slot, Traffic

P = TypeVar("P", bound=PlanSpec)
#: Bytes of a sum from which "auto" scatters it. A reduce-scatter and an all-gather start two kernels where an all-reduce starts one: about
#: 15 µs more between 8 GPUs (NCCL, `src/graph/tuning.cc`). An all-reduce of so many bytes takes ten times as long on NVLink 4
#: (2 · 7/8 · 32 MiB at 378 GB/s), so "auto" costs a tenth of the communication at most.
AUTO_FROM = 32 << 20


def with_tokens_in_parts(plan: P, least: int = 0) -> P:
    """Returns `plan` with scattered sums and gathered inputs; a note says so where it has none that can be.

    Args:
        plan: It.
        least: Bytes of a sum from which it is scattered.
    """
    if plan.tp == 1 or tokens_in_parts(plan):
        return replace(plan, least_scattered=least) if plan.tp > 1 else plan
    changed = {m.path: new for m in plan.modules if (new := _in_parts(plan, m)) is not m}
    left = {path for path, m in changed.items() if _scatters(m)}
    if not left:
        return replace(plan, notes=(*plan.notes, "sequence_parallel changes nothing: no sum of the plan is read token by token"))
    modules = tuple(changed.get(m.path, m) for m in plan.modules)
    return replace(plan, modules=modules, traffic=tuple(_moved(plan, changed)), least_scattered=least)


def with_whole_tokens(plan: P) -> P:
    """Returns `plan` without them."""
    if not tokens_in_parts(plan):
        return plan
    entering = {(m.path, argument) for m in plan.modules for argument in _entering(m)}
    modules = tuple(_whole(m) for m in plan.modules)
    found: list[Traffic] = []
    for t in plan.traffic:
        if t.tokens:
            continue
        changed = t.kind in (CollectiveKind.REDUCE_SCATTER, CollectiveKind.ALL_TO_ALL)
        if changed and (t.when is When.FORWARD or (t.module, t.argument) in entering):
            found.append(replace(t, kind=CollectiveKind.ALL_REDUCE))
        else:
            found.append(t)
    return replace(plan, modules=modules, traffic=tuple(found), least_scattered=0)


def tokens_in_parts(plan: PlanSpec) -> tuple[str, ...]:
    """The modules whose sums are scattered over tokens."""
    return tuple(m.path for m in plan.modules if _scatters(m))


def tokens_asked_for(plan: PlanSpec) -> bool | Literal["auto"]:
    """Returns the `sequence_parallel` that the plan was made with."""
    return bool(tokens_in_parts(plan)) and ("auto" if plan.least_scattered else True)


def kept_less(plan: PlanSpec) -> int:
    """Elements a token that a rank keeps less for the backward: the inputs of regions, of which it keeps its rows."""
    again = (CollectiveKind.ALL_GATHER, When.BACKWARD)
    inputs = sum(t.width for t in plan.traffic if t.tokens and (t.kind, t.when) == again and t.module in plan.tokens.again)
    return inputs * (plan.tp - 1) // plan.tp


def _scatters(m: ModulePlan) -> bool:
    return any(c.op in (Op.SCATTER, Op.COMBINE) for s in m.outputs for c in s.conversions)


def _entering(m: ModulePlan) -> frozenset[str]:
    """The arguments that are gathered, as `Traffic` calls them."""
    slots = [(".".join(map(str, s.path)), s) for s in m.inputs] + [("", s) for s in m.outputs]
    return frozenset(name for name, s in slots if any(c.op in (Op.ENTER, Op.DISPATCH) for c in s.conversions))


def _in_parts(plan: PlanSpec, m: ModulePlan) -> ModulePlan:
    known = plan.tokens

    def out(s: Slot) -> Slot:
        if (m.path, s.path) in known.entered:
            return entering(s)
        if (m.path, s.path) not in known.left or s.conversions[-1].op is not Op.REDUCE or len(s.conversions) > 1 + _joins(s):
            return s
        return Slot(s.path, (*s.conversions[:-1], Conversion(Op.SCATTER)))

    def entering(s: Slot) -> Slot:
        if (m.path, s.path) not in known.entered:
            return s
        return Slot(s.path, tuple(replace(c, op=Op.ENTER) if c.op is Op.COPY else c for c in s.conversions))

    changed = replace(m, inputs=tuple(map(entering, m.inputs)), outputs=tuple(map(out, m.outputs)))
    return m if changed == m else _dispatched(changed)


def _dispatched(m: ModulePlan) -> ModulePlan:
    """A module of whole experts that gets hidden states in token parts, and whose sum is scattered, gets its tokens alone."""
    if m.pairs is None or [(s.path, [c.op for c in s.conversions]) for s in m.outputs] != [((), [Op.SCATTER])]:
        return m
    tokens = [s for s in m.inputs if s.path == (m.pairs.tokens,)]
    if [[c.op for c in s.conversions] for s in tokens] != [[Op.ENTER]]:
        return m
    inputs = tuple(Slot(s.path, (Conversion(Op.DISPATCH),)) if s is tokens[0] else s for s in m.inputs)
    return replace(m, inputs=inputs, outputs=(Slot((), (Conversion(Op.COMBINE),)),))


def _joins(s: Slot) -> bool:
    return s.conversions[0].op is Op.JOIN


def _whole(m: ModulePlan) -> ModulePlan:
    was = {Op.SCATTER: Op.REDUCE, Op.ENTER: Op.COPY, Op.COMBINE: Op.REDUCE, Op.DISPATCH: Op.COPY}

    def whole(s: Slot) -> Slot:
        return Slot(s.path, tuple(replace(c, op=was.get(c.op, c.op)) for c in s.conversions))

    return replace(m, inputs=tuple(map(whole, m.inputs)), outputs=tuple(map(whole, m.outputs)))


def _moved(plan: PlanSpec, changed: dict[str, ModulePlan]) -> Iterator[Traffic]:
    """Each all-reduce becomes a reduce-scatter and an all-gather, or two all-to-alls for experts that are dealt whole.

    A Linear gathers its input once more, for its weight's gradient.
    """
    for t in plan.traffic:
        m = changed.get(t.module)
        scatters = m is not None and _scatters(m) and t.when is When.FORWARD and t.width
        enters = m is not None and t.argument in _entering(m) and t.when is When.BACKWARD and t.width
        if t.kind is not CollectiveKind.ALL_REDUCE or not (scatters or enters):
            yield t
            continue
        routed = m is not None and any(c.op is Op.COMBINE for s in m.outputs for c in s.conversions)
        yield replace(t, kind=CollectiveKind.ALL_TO_ALL if routed else CollectiveKind.REDUCE_SCATTER)
        gather = replace(t, kind=CollectiveKind.ALL_TO_ALL if routed else CollectiveKind.ALL_GATHER, tokens=True)
        yield replace(gather, when=When.BACKWARD if scatters else When.FORWARD)
        if enters and t.module in plan.tokens.again:
            yield replace(gather, when=When.BACKWARD)
    yield from plan.tokens.between
    by_token = {name: p.layout for name, p in plan.params.items() if name.rpartition(".")[0] in plan.tokens.by_token}
    own = {name: prod(layout.shape) for name, layout in by_token.items() if name not in plan.aliases and layout.dim is None}
    if together := sum(n for name, n in own.items() if len(by_token[name].shape) < 2):  # read in one batch
        yield Traffic("", CollectiveKind.ALL_REDUCE, When.BACKWARD, 0, together, tokens=True)
    for name, elements in own.items():
        if len(by_token[name].shape) >= 2:
            yield Traffic(name.rpartition(".")[0], CollectiveKind.ALL_REDUCE, When.BACKWARD, 0, elements, tokens=True)
