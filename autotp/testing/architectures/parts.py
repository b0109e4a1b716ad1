"""Gives the parts of an `Architecture`'s text: modules, linears, sizes, positions, traps."""

from __future__ import annotations

from textwrap import indent

from autotp.testing.architectures.spec import ArchitectureSpec, Position, Sizes, Trap

TRAPS = {
    Trap.WIDTH_SOFTMAX: "h = h.softmax(-1)",
    Trap.WIDTH_FLIP: "h = h.flip(-1)",
    Trap.WIDTH_ROLL: "h = h.roll(1, -1)",
    Trap.WIDTH_SORT: "h = h.sort(-1).values",
    Trap.WIDTH_CUMSUM: "h = h.cumsum(-1)",
    Trap.WIDTH_FIRST: "h = h * h[..., :1]",
    Trap.WIDTH_BRANCH: "h = h * 2 if h.shape[-1] > {width} else h - 1",
    Trap.HEAD_SOFTMAX: "y = y.softmax(1)",
    Trap.HEAD_FLIP: "y = y.flip(1)",
    Trap.HEAD_ROLL: "y = y.roll(1, 1)",
    Trap.HEAD_CUMSUM: "y = y.cumsum(1)",
    Trap.HEAD_FIRST: "y = y * y[:, :1]",
}


def module(name: str, init: list[str], arguments: str, forward: list[str]) -> str:
    """The text of a module class."""
    body = ["super().__init__()", *init]
    return (
        f"class {name}(nn.Module):\n    def __init__(self):\n{indent(chr(10).join(body), ' ' * 8)}\n\n"
        f"    def forward(self, {arguments}):\n{indent(chr(10).join(forward), ' ' * 8)}\n"
    )


def linear(name: str, wide: int, out: int, bias: bool) -> str:
    """A line that makes a Linear."""
    return f"self.@{name} = nn.Linear({wide}, {out}, bias={bias})"


def takes_far(a: ArchitectureSpec) -> bool:
    """Is the position bias made in the model and handed to the blocks?"""
    return a.position is Position.ALIBI_MODEL


class Said:
    """Says sizes as the code does: as attributes of the module, as literals, or left to the shapes."""

    def __init__(self, a: ArchitectureSpec) -> None:
        self.a = a

    def __call__(self, name: str) -> str:
        """`name`: heads, kv, group, size or width."""
        a = self.a
        value = {"heads": a.heads, "kv": a.kv, "group": a.group, "size": a.size, "width": a.width}[name]
        return str(value) if a.sizes is Sizes.LITERALS else f"self.@{name}"

    def many(self, name: str) -> str:
        """A number of heads as a view's argument."""
        return "-1" if self.a.sizes is Sizes.SHAPES else self(name)

    @property
    def attributes(self) -> list[str]:
        a = self.a
        if a.sizes is Sizes.LITERALS:
            return []
        values = {"heads": a.heads, "kv": a.kv, "group": a.group, "size": a.size}
        return [f"self.@{name} = {value}" for name, value in values.items()]


def steps() -> str:
    """Writes the distance of each key from each query, [query, key]."""
    return "torch.arange(t, device=x.device)[None, :] - torch.arange(t, device=x.device)[:, None]"


def slopes(heads: str) -> str:
    """One slope for each head."""
    return f"2.0 ** -(torch.arange(1, {heads} + 1, dtype=x.dtype, device=x.device) / 2)"
