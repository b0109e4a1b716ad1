"""Writes the text of an mlp, and of a mixture of experts."""

from __future__ import annotations

from autotp.testing.architectures.parts import TRAPS, Said, linear
from autotp.testing.architectures.spec import ACTIVATIONS, ArchitectureSpec, Experts, Extra, Mlp, Sizes, Trap


def mlp_init(a: ArchitectureSpec) -> list[str]:
    """Lines of the `__init__` of an mlp."""
    e, w = a.embedding, a.width
    lines = [linear("up", e, w * (2 if a.mlp in (Mlp.HALVES, Mlp.PAIRS) else 1), a.bias)]
    lines += [linear("gate", e, w, a.bias)] if a.mlp is Mlp.GATED else []
    lines.append(linear("down", w, e, a.bias))
    lines += [f"self.@conv = nn.Conv1d({w}, {w}, 3, groups={w}, padding=2, bias={a.bias})"] if Extra.CONV in a.extras else []
    lines += ["self.@drop2 = nn.Dropout(0.1)"] if Extra.DROPOUT in a.extras else []
    return lines + ([f"self.@width = {w}"] if a.mlp is Mlp.HALVES and a.sizes is Sizes.ATTRIBUTES else [])


def mlp_forward(a: ArchitectureSpec) -> list[str]:
    """Lines that make z of x."""
    act = ACTIVATIONS[a.activation]
    match a.mlp:
        case Mlp.PLAIN:
            lines = [f"h = {act}(self.@up(x))"]
        case Mlp.GATED:
            lines = [f"h = {act}(self.@gate(x)) * self.@up(x)"]
        case Mlp.HALVES:
            cut = "chunk(2, -1)" if a.sizes is Sizes.SHAPES else f"split({Said(a)('width')}, -1)"
            lines = [f"g, h = self.@up(x).{cut}", f"h = {act}(g) * h"]
        case Mlp.PAIRS:
            lines = ["h = self.@up(x)", f"h = {act}(h[..., ::2]) * h[..., 1::2]"]
    if a.trap is not Trap.NONE and not a.trap.on_heads:
        lines.append(TRAPS[a.trap].format(width=a.width - 1))
    lines += ["h = self.@conv(h.transpose(-1, -2))[..., : h.shape[-2]].transpose(-1, -2)"] if Extra.CONV in a.extras else []
    lines += ["h = h - h.mean(-1, keepdim=True)"] if Extra.MEAN in a.extras else []
    lines += ["h = h.transpose(-1, -2).reshape(h.shape)"] if Extra.VIEW in a.extras else []
    return [*lines, "z = self.@drop2(self.@down(h))" if Extra.DROPOUT in a.extras else "z = self.@down(h)"]


def experts_init(a: ArchitectureSpec) -> list[str]:
    """Lines of the `__init__` of a mixture."""
    e, w = a.embedding, a.width
    lines = [linear("route", e, 3, False)]
    if a.experts is Experts.DENSE:
        return [*lines, f"self.@ups = nn.Parameter(torch.randn(3, {e}, {2 * w}))", f"self.@downs = nn.Parameter(torch.randn(3, {w}, {e}))"]
    lines.append("self.@many = nn.ModuleList(@Feed() for _ in range(3))")
    return lines + (["self.@always = @Feed()"] if a.experts is Experts.SHARED else [])


def experts_forward(a: ArchitectureSpec) -> list[str]:
    """Lines that make z of x by a mixture."""
    act = ACTIVATIONS[a.activation]
    if a.experts is Experts.DENSE:
        return [
            "flat = x.flatten(0, 1)",
            "g, h = torch.bmm(flat.expand(3, -1, -1), self.@ups).chunk(2, -1)",
            f"h = torch.bmm({act}(g) * h, self.@downs)",
            "z = (h * self.@route(flat).softmax(-1).t()[..., None]).sum(0).view_as(x)",
        ]
    return [
        "flat = x.flatten(0, 1)",
        "weight, chosen = self.@route(flat).softmax(-1).topk(2, -1)",
        "z = torch.zeros_like(flat)",
        "for i, one in enumerate(self.@many):",
        "    row, slot = torch.where(chosen == i)",
        "    z = z.index_add(0, row, one(flat[row]) * weight[row, slot, None])",
        f"z = z.view_as(x){' + self.@always(x)' if a.experts is Experts.SHARED else ''}",
    ]
