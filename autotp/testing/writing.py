"""The text of an `Architecture`. `@name` in a template becomes a name without meaning."""

from __future__ import annotations

import random
import re
from textwrap import indent

from autotp.testing.architecture import (
    ACTIVATIONS,
    ALIBI,
    ROTARY,
    Architecture,
    Experts,
    Extra,
    Mlp,
    Norms,
    Position,
    Product,
    Projection,
    QKNorm,
    Sizes,
    Trap,
    Turning,
)

_HEAD = """\
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn


"""
_LETTERS = "bcdfghjklmnpqrstvwxz"
_TRAPS = {
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


def write(a: Architecture) -> str:
    """The whole module."""
    parts = [_norm(a), *_turning(a)]
    if not a.inline:
        parts.append(_module("@Mix", [*_attention_init(a)], "x, far" if _far(a) else "x", _attention_forward(a)))
    if not a.inline or a.experts is not Experts.NONE:
        parts.append(_module("@Feed", _mlp_init(a), "x", [*_mlp_forward(a), "return z"]))
    if a.experts is not Experts.NONE:
        parts.append(_module("@Pick", _experts_init(a), "x", [*_experts_forward(a), "return z"]))
    parts += [_block(a), _model(a)]
    return _named(_HEAD + "\n\n".join(parts), a.names)


def trapped(a: Architecture) -> tuple[tuple[str, int], ...]:
    """See `Architecture.kept`. A trap on heads keeps what makes queries, one on the width both weights of a dense mlp."""
    if a.trap is Trap.NONE or (a.heads if a.trap.on_heads else a.width) == 1:
        return ()
    if a.trap.on_heads:
        own = {Projection.SEPARATE: "q.weight", Projection.EINSUM: "q", Projection.LATENT: "q.weight", Projection.TRANSPOSED: "qkv"}
        inner, found = "@mix.", [(own.get(a.projection, "qkv.weight"), int(a.projection is Projection.TRANSPOSED))]
    elif a.experts is not Experts.NONE:
        return ()
    else:
        inner, found = "@feed.", [("up.weight", 0), ("down.weight", 1)]
    return tuple((_named(f"@blocks.0.{'' if a.inline else inner}@{name}", a.names), dim) for name, dim in found)


def _named(text: str, seed: int) -> str:
    return re.sub(r"@(\w+)", lambda m: _name(seed, m[1]), text)


def _name(seed: int, word: str) -> str:
    draw = random.Random(f"{seed} {word}")
    made = "".join(draw.choice(_LETTERS) + draw.choice("aeiou") for _ in range(3))
    return (made.title() if word[0].isupper() else made) + str(draw.randrange(100))


def _module(name: str, init: list[str], arguments: str, forward: list[str]) -> str:
    body = ["super().__init__()", *init]
    return (
        f"class {name}(nn.Module):\n    def __init__(self):\n{indent(chr(10).join(body), ' ' * 8)}\n\n"
        f"    def forward(self, {arguments}):\n{indent(chr(10).join(forward), ' ' * 8)}\n"
    )


def _linear(name: str, wide: int, out: int, bias: bool) -> str:
    return f"self.@{name} = nn.Linear({wide}, {out}, bias={bias})"


def _norm(a: Architecture) -> str:
    init = "self.weight = nn.Parameter(torch.ones(n))"
    if a.layer_norm:
        init += "\nself.bias = nn.Parameter(torch.zeros(n))"
        body = "return F.layer_norm(x, self.weight.shape, self.weight, self.bias)"
    else:
        body = "return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))"
    text = _module("@Norm", init.splitlines(), "x", [body])
    return text.replace("def __init__(self)", "def __init__(self, n)")


def _far(a: Architecture) -> bool:
    return a.position is Position.ALIBI_MODEL


class _Said:
    """How the code says sizes: as attributes of the module, as literals, or left to the shapes."""

    def __init__(self, a: Architecture) -> None:
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


def _attention_init(a: Architecture) -> list[str]:
    e, h, k, d = a.embedding, a.heads, a.kv, a.size
    fused = (h + 2 * k) * d
    match a.projection:
        case Projection.SEPARATE:
            lines = [_linear("q", e, h * d, a.bias), _linear("k", e, k * d, a.bias), _linear("v", e, k * d, a.bias)]
        case Projection.TRANSPOSED:
            lines = [f"self.@qkv = nn.Parameter(torch.randn({e}, {fused}))"]
            lines += [f"self.@plus = nn.Parameter(torch.randn({fused}))"] if a.bias else []
        case Projection.EINSUM:
            lines = [f"self.@{n} = nn.Parameter(torch.randn({m}, {e}, {d}))" for n, m in (("q", h), ("k", k), ("v", k))]
            lines += [f"self.@plus = nn.Parameter(torch.randn({h}, 1, {d}))"] if a.bias else []
        case Projection.LATENT:
            lines = [_linear("q", e, h * 2 * d, a.bias), _linear("low_kv", e, 3 + d, a.bias), "self.@inner = @Norm(3)"]
            lines += [_linear("up_kv", 3, h * 2 * d, a.bias)]
        case _:
            lines = [_linear("qkv", e, fused, a.bias)]
    if a.projection is Projection.EINSUM:
        lines.append(f"self.@o = nn.Parameter(torch.randn({h}, {d}, {e}))")
    else:
        lines.append(_linear("o", h * d, e, a.bias))
    if a.qk_norm is QKNorm.HEAD:
        wide = 2 * d if a.projection is Projection.LATENT else d
        lines += [f"self.@qn = @Norm({wide})", *([] if Extra.ONE_NORM in a.extras else [f"self.@kn = @Norm({wide})"])]
    elif a.qk_norm is QKNorm.FULL:
        lines += [f"self.@qn, self.@kn = @Norm({h * d}), @Norm({k * d})"]
    if a.position is Position.RELATIVE:
        lines.append(f"self.@far = nn.Embedding(8, {h})")
    if a.turning is Turning.MODULE and _turning(a):
        lines.append("self.@turned = @Turned()")
    made = {
        Extra.TEMPERATURE: f"self.@warm = nn.Parameter(torch.ones({h}, 1, 1))",
        Extra.SINK: f"self.@sink = nn.Parameter(torch.randn({h}))",
        Extra.HEAD_GATE: _linear("each", e, h, a.bias),
        Extra.CHANNEL_GATE: _linear("entry", e, h * d, a.bias),
        Extra.SUB_NORM: f"self.@sub = @Norm({h * d})",
        Extra.HEAD_NORM: f"self.@own = @Norm({d})",
        Extra.LORA: f"self.@thin, self.@wide = nn.Linear({e}, 2, bias=False), nn.Linear(2, {h * d}, bias=False)",
        Extra.DROPOUT: "self.@drop = nn.Dropout(0.1)",
    }
    lines += [line for extra, line in made.items() if extra in a.extras]
    return lines + _Said(a).attributes


def _attention_forward(a: Architecture) -> list[str]:
    said = _Said(a)
    lines = ["b, t = x.shape[:2]", *_project(a, said)]
    if a.qk_norm is QKNorm.HEAD:
        lines.append(f"q, k = self.@qn(q), self.@{'qn' if Extra.ONE_NORM in a.extras else 'kn'}(k)")
    if a.position in ROTARY and a.projection is not Projection.LATENT:
        lines += _rotary(a)
    lines += ["q = q * self.@warm"] if Extra.TEMPERATURE in a.extras else []
    lines += _bias(a, said)
    lines += _attend(a, said)
    if a.trap.on_heads:
        lines.append(_TRAPS[a.trap])
    if Extra.HEAD_NORM in a.extras:
        lines.append("y = self.@own(y)")
    if Extra.HEAD_GATE in a.extras:
        lines.append("y = y * torch.sigmoid(self.@each(x)).transpose(1, 2)[..., None]")
    if a.projection is Projection.EINSUM:
        return [*lines, 'return torch.einsum("bhtd,hde->bte", y, self.@o)']
    flat = {
        Sizes.ATTRIBUTES: f"y.transpose(1, 2).reshape(b, t, {said('heads')} * {said('size')})",
        Sizes.LITERALS: f"y.transpose(1, 2).reshape(b, t, {a.heads * a.size})",
        Sizes.SHAPES: "y.transpose(1, 2).flatten(2)",
    }[a.sizes]
    lines.append(f"y = {flat}")
    lines += ["y = self.@sub(y)"] if Extra.SUB_NORM in a.extras else []
    lines += ["y = y * torch.sigmoid(self.@entry(x))"] if Extra.CHANNEL_GATE in a.extras else []
    return [*lines, "return self.@drop(self.@o(y))" if Extra.DROPOUT in a.extras else "return self.@o(y)"]


def _project(a: Architecture, said: _Said) -> list[str]:
    """Lines that make q [b, heads, t, size], k and v [b, kv, t, size] of x [b, t, embedding]."""
    d, heads, kv = said("size"), said.many("heads"), said.many("kv")
    match a.projection:
        case Projection.EINSUM:
            plus = " + self.@plus" if a.bias else ""
            made = [f'{n} = torch.einsum("bte,hed->bhtd", x, self.@{n})' for n in "qkv"]
            return [made[0] + plus, *made[1:]]
        case Projection.GROUPED:
            own = {Sizes.LITERALS: str(a.group + 2)}.get(a.sizes, f"{said('group')} + 2")
            take = {Sizes.LITERALS: str(a.group)}.get(a.sizes, said("group"))
            return [
                f"y = self.@qkv(x).view(b, t, {kv}, {own}, {d})",
                f"q, k, v = y.split([{take}, 1, 1], 3)",
                "q, k, v = (z.flatten(2, 3).transpose(1, 2) for z in (q, k, v))",
            ]
        case Projection.INTERLEAVED:
            return [f"q, k, v = (z.transpose(1, 2) for z in self.@qkv(x).view(b, t, {heads}, 3, {d}).unbind(3))"]
        case Projection.LATENT:
            return _latent(a, said)
        case Projection.SEPARATE:
            thin = " + self.@wide(self.@thin(x))" if Extra.LORA in a.extras else ""
            made = [f"q, k, v = self.@q(x){thin}, self.@k(x), self.@v(x)"]
        case _:
            y = "self.@qkv(x)"
            if a.projection is Projection.TRANSPOSED:
                y = "x @ self.@qkv" + (" + self.@plus" if a.bias else "")
            match a.sizes:
                case Sizes.LITERALS:
                    cuts = f"{a.heads * a.size}, {a.kv * a.size}, {a.kv * a.size}"
                case Sizes.ATTRIBUTES:
                    cuts = f"{said('heads')} * {d}, {said('kv')} * {d}, {said('kv')} * {d}"
                case Sizes.SHAPES:
                    n = f"y.shape[-1] // ({said('group')} + 2)"
                    cuts = f"{n} * {said('group')}, {n}, {n}"
            made = [f"y = {y}", f"q, k, v = y.split([{cuts}], -1)"]
    if a.qk_norm is QKNorm.FULL:
        made.append("q, k = self.@qn(q), self.@kn(k)")
    return [*made, f"q = q.view(b, t, {heads}, {d}).transpose(1, 2)", f"k, v = (z.view(b, t, {kv}, {d}).transpose(1, 2) for z in (k, v))"]


def _latent(a: Architecture, said: _Said) -> list[str]:
    d, heads = said("size"), said.many("heads")
    turn = ["turn, one = (torch.cat([z * cos + torch.cat([-z[..., n:], z[..., :n]], -1) * sin], -1) for z in (turn, one))"]
    lines = [
        f"q = self.@q(x).view(b, t, {heads}, 2 * {d}).transpose(1, 2)",
        f"low, one = self.@low_kv(x).split([3, {d}], -1)",
        "one = one[:, None]",
        f"k, v = self.@up_kv(self.@inner(low)).view(b, t, {heads}, 2 * {d}).transpose(1, 2).split({d}, -1)",
        f"plain, turn = q.split({d}, -1)",
    ]
    if a.position is Position.ROTARY:
        lines += [*_angles(a, "turn"), *turn]
    return [*lines, "q, k = torch.cat([plain, turn], -1), torch.cat([k, one.expand(-1, k.shape[1], -1, -1)], -1)"]


def _angles(a: Architecture, of: str) -> list[str]:
    lines = [
        f"n = {of}.shape[-1] // 2",
        f"at = torch.arange(t, dtype={of}.dtype, device={of}.device)",
        f"angle = torch.outer(at, 10.0 ** -torch.arange(n, dtype={of}.dtype, device={of}.device))",
    ]
    if a.position is Position.ROTARY_PAIRS:
        return [*lines, "cos, sin = angle.cos(), angle.sin()"]
    return [*lines, "cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()"]


def _rotary(a: Architecture) -> list[str]:
    match a.turning:
        case Turning.GENERATOR:
            return [*_angles(a, "q"), f"q, k = ({_turned(a)} for z in (q, k))"]
        case Turning.LINES:
            return [*_angles(a, "q"), *(f"{name} = {_turned(a, name)}" for name in "qk")]
        case Turning.FUNCTION:
            return ["q, k = @turn(q), @turn(k)"]
        case Turning.MODULE:
            return ["q, k = self.@turned(q), self.@turned(k)"]


def _turned(a: Architecture, of: str = "z") -> str:
    if a.position is Position.ROTARY:
        return f"{of} * cos + torch.cat([-{of}[..., n:], {of}[..., :n]], -1) * sin"
    even, odd = f"{of}[..., ::2]", f"{of}[..., 1::2]"
    return f"torch.stack([{even} * cos - {odd} * sin, {even} * sin + {odd} * cos], -1).flatten(-2)"


def _turning(a: Architecture) -> list[str]:
    """What of the code that turns stands outside of the attention."""
    if a.position not in ROTARY or a.projection is Projection.LATENT:
        return []
    body = ["t = z.shape[-2]", *_angles(a, "z"), f"return {_turned(a)}"]
    if a.turning is Turning.FUNCTION:
        return [f"def @turn(z):\n{indent(chr(10).join(body), ' ' * 4)}\n"]
    return [_module("@Turned", [], "z", body)] if a.turning is Turning.MODULE else []


def _steps() -> str:
    return "torch.arange(t, device=x.device)[None, :] - torch.arange(t, device=x.device)[:, None]"


def _slopes(heads: str) -> str:
    return f"2.0 ** -(torch.arange(1, {heads} + 1, dtype=x.dtype, device=x.device) / 2)"


def _bias(a: Architecture, said: _Said) -> list[str]:
    """Lines that make `bias`, added to the scores before the softmax, from what positions need."""
    match a.position:
        case Position.ALIBI:
            heads = "q.shape[1]" if a.sizes is Sizes.SHAPES else said("heads")
            return [f"bias = ({_slopes(heads)})[:, None, None] * ({_steps()})"]
        case Position.ALIBI_MODEL:
            return ["bias = far"]
        case Position.RELATIVE:
            return [f"bias = self.@far(({_steps()}).clamp(-3, 3) + 3).permute(2, 0, 1)"]
        case _:
            return []


def _attend(a: Architecture, said: _Said) -> list[str]:
    """Lines that make y [b, heads, t, size]."""
    biased = a.position in (*ALIBI, Position.RELATIVE)
    hidden = "hidden = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)"
    repeat: list[str] = []
    if a.group > 1 and a.product in (Product.FUSED, Product.WRITTEN):
        if a.names % 2:
            repeat = [f"k, v = (z.repeat_interleave({said('group')}, 1) for z in (k, v))"]
        else:
            group = said("group")
            repeat = [f"k, v = (z[:, :, None].expand(-1, -1, {group}, -1, -1).flatten(1, 2) for z in (k, v))"]
    if a.product in (Product.FUSED, Product.FUSED_GROUPED):
        grouped = ", enable_gqa=True" if a.product is Product.FUSED_GROUPED and a.group > 1 else ""
        if not biased:
            return [*repeat, f"y = F.scaled_dot_product_attention(q, k, v, is_causal=True{grouped})"]
        return [
            *repeat,
            hidden,
            'mask = bias.to(q.dtype).masked_fill(hidden, float("-inf"))[None]',
            f"y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask{grouped})",
        ]
    plus = " + bias" if biased else ""
    if a.product is Product.WRITTEN or a.group == 1:
        return [
            *repeat,
            hidden,
            f"w = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5{plus}",
            *_softmax(a),
        ]
    kv, group = said.many("kv"), said("group")
    plus = f" + bias.unflatten(0, ({kv}, {group}))" if biased else ""
    return [
        hidden,
        f"q = q.unflatten(1, ({kv}, {group}))",
        f'w = torch.einsum("bkgqd,bksd->bkgqs", q, k) * q.shape[-1] ** -0.5{plus}',
        'w = w.masked_fill(hidden, float("-inf")).softmax(-1)',
        'y = torch.einsum("bkgqs,bksd->bkgqd", w, v).flatten(1, 2)',
    ]


def _softmax(a: Architecture) -> list[str]:
    if Extra.SINK not in a.extras:
        return ['y = w.masked_fill(hidden, float("-inf")).softmax(-1) @ v']
    return [
        "sink = self.@sink.view(1, -1, 1, 1).expand(b, -1, t, 1)",
        'w = torch.cat([w.masked_fill(hidden, float("-inf")), sink], -1).softmax(-1)',
        "y = w[..., :-1] @ v",
    ]


def _mlp_init(a: Architecture) -> list[str]:
    e, w = a.embedding, a.width
    lines = [_linear("up", e, w * (2 if a.mlp in (Mlp.HALVES, Mlp.PAIRS) else 1), a.bias)]
    lines += [_linear("gate", e, w, a.bias)] if a.mlp is Mlp.GATED else []
    lines.append(_linear("down", w, e, a.bias))
    lines += [f"self.@conv = nn.Conv1d({w}, {w}, 3, groups={w}, padding=2, bias={a.bias})"] if Extra.CONV in a.extras else []
    lines += ["self.@drop2 = nn.Dropout(0.1)"] if Extra.DROPOUT in a.extras else []
    return lines + ([f"self.@width = {w}"] if a.mlp is Mlp.HALVES and a.sizes is Sizes.ATTRIBUTES else [])


def _mlp_forward(a: Architecture) -> list[str]:
    """Lines that make z of x."""
    act = ACTIVATIONS[a.activation]
    match a.mlp:
        case Mlp.PLAIN:
            lines = [f"h = {act}(self.@up(x))"]
        case Mlp.GATED:
            lines = [f"h = {act}(self.@gate(x)) * self.@up(x)"]
        case Mlp.HALVES:
            cut = "chunk(2, -1)" if a.sizes is Sizes.SHAPES else f"split({_Said(a)('width')}, -1)"
            lines = [f"g, h = self.@up(x).{cut}", f"h = {act}(g) * h"]
        case Mlp.PAIRS:
            lines = ["h = self.@up(x)", f"h = {act}(h[..., ::2]) * h[..., 1::2]"]
    if a.trap is not Trap.NONE and not a.trap.on_heads:
        lines.append(_TRAPS[a.trap].format(width=a.width - 1))
    lines += ["h = self.@conv(h.transpose(-1, -2))[..., : h.shape[-2]].transpose(-1, -2)"] if Extra.CONV in a.extras else []
    lines += ["h = h - h.mean(-1, keepdim=True)"] if Extra.MEAN in a.extras else []
    return [*lines, "z = self.@drop2(self.@down(h))" if Extra.DROPOUT in a.extras else "z = self.@down(h)"]


def _experts_init(a: Architecture) -> list[str]:
    e, w = a.embedding, a.width
    lines = [_linear("route", e, 3, False)]
    if a.experts is Experts.DENSE:
        return [*lines, f"self.@ups = nn.Parameter(torch.randn(3, {e}, {2 * w}))", f"self.@downs = nn.Parameter(torch.randn(3, {w}, {e}))"]
    lines.append("self.@many = nn.ModuleList(@Feed() for _ in range(3))")
    return lines + (["self.@always = @Feed()"] if a.experts is Experts.SHARED else [])


def _experts_forward(a: Architecture) -> list[str]:
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


def _block(a: Architecture) -> str:
    norms = ["n1", *(["n2"] if not a.parallel else []), *(["n3", "n4"] if a.norms is Norms.BOTH else [])]
    init = [f"self.@{n} = @Norm({a.embedding})" for n in norms]
    far = ", far" if _far(a) else ""
    feed = "@Pick" if a.experts is not Experts.NONE else "@Feed"
    methods = ""
    if a.inline:
        init += _attention_init(a)
        methods = f"\n    def @attend(self, x{far}):\n{indent(chr(10).join(_attention_forward(a)), ' ' * 8)}\n"
        mix = f"self.@attend({{}}{far})"
        if a.experts is Experts.NONE:
            init += _mlp_init(a)
            methods += f"\n    def @widen(self, x):\n{indent(chr(10).join([*_mlp_forward(a), 'return z']), ' ' * 8)}\n"
            mlp = "self.@widen({})"
        else:
            init.append(f"self.@feed = {feed}()")
            mlp = "self.@feed({})"
    else:
        init += ["self.@mix = @Mix()", f"self.@feed = {feed}()"]
        mix, mlp = f"self.@mix({{}}{far})", "self.@feed({})"
    if Extra.LAYER_SCALE in a.extras:
        init += [f"self.@s1, self.@s2 = nn.Parameter(torch.ones({a.embedding})), nn.Parameter(torch.ones({a.embedding}))"]
        mix, mlp = f"self.@s1 * {mix}", f"self.@s2 * {mlp}"
    if Extra.SCALED in a.extras:
        mix, mlp = f"0.5 * {mix}", f"0.5 * {mlp}"
    before = "self.@{}(x)" if a.norms is not Norms.POST else "x"
    after = {Norms.PRE: "{}", Norms.POST: "self.@{n}({v})", Norms.BOTH: "self.@{n}({v})"}[a.norms]
    if a.parallel:
        lines = [f"y = {before.format('n1')}"]
        both = f"{mix.format('y')} + {mlp.format('y')}"
        if a.norms is Norms.PRE:
            lines.append(f"return x + {both}")
        elif a.norms is Norms.POST:
            lines.append(f"return self.@n1(x + {both})")
        else:
            lines.append(f"return x + self.@n3({mix.format('y')}) + self.@n4({mlp.format('y')})")
    elif a.norms is Norms.POST:
        lines = [f"x = self.@n1(x + {mix.format('x')})", f"return self.@n2(x + {mlp.format('x')})"]
    else:
        first, second = mix.format(before.format("n1")), mlp.format(before.format("n2"))
        wrap = (lambda v, n: after.format(n=n, v=v)) if a.norms is Norms.BOTH else (lambda v, n: v)
        lines = [f"x = x + {wrap(first, 'n3')}", f"return x + {wrap(second, 'n4')}"]
    return _module("@Block", init, f"x{far}", lines) + methods


def _model(a: Architecture) -> str:
    init = [f"self.@embed = nn.Embedding({a.vocab}, {a.embedding})"]
    init += [f"self.@place = nn.Embedding(8, {a.embedding})"] if a.position is Position.LEARNED else []
    init += [f"self.@blocks = nn.ModuleList(@Block() for _ in range({a.layers}))", f"self.@last = @Norm({a.embedding})"]
    init.append(f"self.@head = nn.Linear({a.embedding}, {a.vocab}, bias={Extra.HEAD_BIAS in a.extras})")
    init += ["self.@head.weight = self.@embed.weight"] if a.tied else []
    forward = ["x = self.@embed(ids)", "t = ids.shape[1]"]
    forward += ["x = x + self.@place(torch.arange(t, device=ids.device))"] if a.position is Position.LEARNED else []
    if _far(a):
        heads = str(a.heads) if a.sizes is not Sizes.ATTRIBUTES else "self.@heads"
        init += [f"self.@heads = {a.heads}"] if a.sizes is Sizes.ATTRIBUTES else []
        forward.append(f"far = ({_slopes(heads)})[:, None, None] * ({_steps()})")
    forward += [f"x = x * {a.embedding} ** 0.5"] if Extra.SCALED in a.extras else []
    called = f"block(x{', far' if _far(a) else ''})"
    if Extra.CHECKPOINT in a.extras:
        called = f"torch.utils.checkpoint.checkpoint({called.replace('(', ', ')[:-1]}, use_reentrant=False)"
    if Extra.AGAIN in a.extras:
        forward += ["for _ in range(2):", "    for block in self.@blocks:", f"        x = {called}"]
    else:
        forward += ["for block in self.@blocks:", f"    x = {called}"]
    forward.append("z = self.@head(self.@last(x))")
    forward += ["z = 5.0 * torch.tanh(z / 5.0)"] if Extra.CAP in a.extras else []
    loss = "F.cross_entropy(z.flatten(0, 1), targets.flatten())"
    forward.append(f'return {{"logits": z, "loss": {loss}}}' if a.loss else "return z")
    return _module("Model", init, "ids, targets" if a.loss else "ids", forward)
