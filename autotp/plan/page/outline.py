"""The modules of a plan as nested blocks. Neighbours in a list that are alike are one block, with how many there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch

from autotp.plan.conversions import CollectiveKind, Op, When
from autotp.plan.cost import collectives
from autotp.plan.kinds import Kind
from autotp.plan.rows import Row, Table
from autotp.plan.spec import ModulePlan, PlanSpec, Traffic


@dataclass(frozen=True, slots=True)
class Arrow:
    """A collective: bytes of its result, for each token or for each step (the gradient of a parameter)."""

    kind: CollectiveKind
    when: When
    bytes: int
    per: str


@dataclass(frozen=True, slots=True)
class Line:
    """A parameter of a block; `row` is that of the table."""

    name: str
    row: Row


@dataclass(frozen=True, slots=True)
class Block:
    """`count` modules that are alike, the first one's name first. Arrows stand above it (`entering`) or below it (`leaving`).

    left_out: parameters and blocks inside that the page does not show, because it would be too long.
    """

    name: str
    count: int = 1
    lines: tuple[Line, ...] = ()
    blocks: tuple[Block, ...] = ()
    entering: tuple[Arrow, ...] = ()
    leaving: tuple[Arrow, ...] = ()
    left_out: int = 0

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Returns the kinds of parameters inside, each once."""
        inside = [line.row.kind for line in self.lines] + [kind for block in self.blocks for kind in block.kinds]
        return tuple(kind for kind in Kind if kind in inside)

    @property
    def size(self) -> int:
        """Counts the blocks and lines that a reader sees when all is open."""
        return 1 + len(self.lines) + sum(block.size for block in self.blocks)


@dataclass(slots=True)
class _Module:
    lines: list[Line] = field(default_factory=list)
    inside: dict[str, _Module] = field(default_factory=dict)
    arrows: list[tuple[Arrow, bool]] = field(default_factory=list)

    def at(self, path: str) -> _Module:
        found = self
        for part in path.split(".") if path else ():
            found = found.inside.setdefault(part, _Module())
        return found


def outline(plan: PlanSpec, table: Table, dtype: torch.dtype) -> Block:
    """Returns the whole model as one block.

    Args:
        plan: It.
        table: Its table.
        dtype: Of what is sent.
    """
    root = _Module()
    for name in plan.params:
        path, _, leaf = name.rpartition(".")
        root.at(path).lines.append(Line(leaf, table.row_of[name]))
    modules = {m.path: m for m in plan.modules}
    for t, sent in zip(plan.traffic, collectives(plan, 1, dtype), strict=True):
        arrow = Arrow(t.kind, t.when, sent.bytes, "token" if t.width else "step")
        root.at(t.module).arrows.append((arrow, _above(t, modules.get(t.module, ModulePlan(t.module)))))
    return replace(_block(plan.model, root), name=plan.model)


def _above(t: Traffic, m: ModulePlan) -> bool:
    """True where values enter: gradients of what enters are summed there, and token parts gathered."""
    if t.argument or t.kind is CollectiveKind.ALL_TO_ALL:
        return bool(t.argument)
    enters = any(c.op is Op.ENTER for slot in m.inputs for c in slot.conversions)
    scatters = any(c.op is Op.SCATTER for slot in m.outputs for c in slot.conversions)
    if t.kind is CollectiveKind.ALL_GATHER:
        return enters if t.when is When.FORWARD else enters or not scatters
    return t.when is When.BACKWARD


def _block(name: str, module: _Module) -> Block:
    blocks = tuple(_folded(_block(part, inside) for part, inside in module.inside.items()))
    entering, leaving = (tuple(dict.fromkeys(a for a, above in module.arrows if above is side)) for side in (True, False))
    if len(blocks) == 1 and not module.lines and not module.arrows:  # a list of blocks that are alike
        return replace(blocks[0], name=f"{name}.{blocks[0].name}")
    return Block(name, 1, tuple(module.lines), blocks, entering, leaving)


def _folded(blocks: Iterable[Block]) -> Iterator[Block]:
    for _, alike in groupby(blocks, key=lambda b: replace(b, name="#" if _number(b.name) else b.name)):
        first, *more = alike
        if more and first.count == 1:
            yield replace(first, name=f"{first.name}…{more[-1].name}", count=1 + len(more))
        else:
            yield from (first, *more)


def _number(name: str) -> bool:
    return name.partition(".")[0].isdigit()


def shortened(block: Block, most: int) -> Block:
    """Returns the block with at most about `most` blocks and lines: the first ones, in the order of the page."""
    if block.size <= most:
        return block
    lines, room = block.lines[: max(most - 1, 0)], most - 1 - len(block.lines)
    blocks: list[Block] = []
    for inside in block.blocks:
        if room <= 0:
            break
        blocks.append(shortened(inside, room))
        room -= blocks[-1].size
    left = len(block.lines) - len(lines) + sum(inside.size for inside in block.blocks[len(blocks) :])
    return replace(block, lines=lines, blocks=tuple(blocks), left_out=left)
