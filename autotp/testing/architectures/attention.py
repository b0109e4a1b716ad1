"""Writes the text of an attention: lines of `__init__` and of `forward`."""

from __future__ import annotations

from textwrap import indent

from autotp.testing.architectures.parts import TRAPS, Said, linear, module, slopes, steps
from autotp.testing.architectures.spec import ALIBI, ROTARY, ArchitectureSpec, Extra, Position, Product, Projection, QKNorm, Sizes, Turning


def attention_init(a: ArchitectureSpec) -> list[str]:
    """Lines of the `__init__` that attention needs."""
    e, h, k, d = a.embedding, a.heads, a.kv, a.size
    fused = (h + 2 * k) * d
    match a.projection:
        case Projection.SEPARATE:
            lines = [linear("q", e, h * d, a.bias), linear("k", e, k * d, a.bias), linear("v", e, k * d, a.bias)]
        case Projection.TRANSPOSED:
            lines = [f"self.@qkv = nn.Parameter(torch.randn({e}, {fused}))"]
            lines += [f"self.@plus = nn.Parameter(torch.randn({fused}))"] if a.bias else []
        case Projection.EINSUM:
            lines = [f"self.@{n} = nn.Parameter(torch.randn({m}, {e}, {d}))" for n, m in (("q", h), ("k", k), ("v", k))]
            lines += [f"self.@plus = nn.Parameter(torch.randn({h}, 1, {d}))"] if a.bias else []
        case Projection.LATENT:
            lines = [linear("q", e, h * 2 * d, a.bias), linear("low_kv", e, 3 + d, a.bias), "self.@inner = @Norm(3)"]
            lines += [linear("up_kv", 3, h * 2 * d, a.bias)]
        case _:
            lines = [linear("qkv", e, fused, a.bias)]
    if a.projection is Projection.EINSUM:
        lines.append(f"self.@o = nn.Parameter(torch.randn({h}, {d}, {e}))")
    else:
        lines.append(linear("o", h * d, e, a.bias))
    if a.qk_norm is QKNorm.HEAD:
        wide = 2 * d if a.projection is Projection.LATENT else d
        lines += [f"self.@qn = @Norm({wide})", *([] if Extra.ONE_NORM in a.extras else [f"self.@kn = @Norm({wide})"])]
    elif a.qk_norm is QKNorm.FULL:
        lines += [f"self.@qn, self.@kn = @Norm({h * d}), @Norm({k * d})"]
    if a.position is Position.RELATIVE:
        lines.append(f"self.@far = nn.Embedding(8, {h})")
    if a.turning is Turning.MODULE and turning(a):
        lines.append("self.@turned = @Turned()")
    made = {
        Extra.TEMPERATURE: f"self.@warm = nn.Parameter(torch.ones({h}, 1, 1))",
        Extra.SINK: f"self.@sink = nn.Parameter(torch.randn({h}))",
        Extra.HEAD_GATE: linear("each", e, h, a.bias),
        Extra.CHANNEL_GATE: linear("entry", e, h * d, a.bias),
        Extra.SUB_NORM: f"self.@sub = @Norm({h * d})",
        Extra.HEAD_NORM: f"self.@own = @Norm({d})",
        Extra.LORA: f"self.@thin, self.@wide = nn.Linear({e}, 2, bias=False), nn.Linear(2, {h * d}, bias=False)",
        Extra.DROPOUT: "self.@drop = nn.Dropout(0.1)",
    }
    lines += [line for extra, line in made.items() if extra in a.extras]
    return lines + Said(a).attributes


def attention_forward(a: ArchitectureSpec) -> list[str]:
    """Lines of a forward from x to what attention returns."""
    said = Said(a)
    lines = ["b, t = x.shape[:2]", *_project(a, said)]
    if a.qk_norm is QKNorm.HEAD:
        lines.append(f"q, k = self.@qn(q), self.@{'qn' if Extra.ONE_NORM in a.extras else 'kn'}(k)")
    if a.position in ROTARY and a.projection is not Projection.LATENT:
        lines += _rotary(a)
    lines += ["q = q * self.@warm"] if Extra.TEMPERATURE in a.extras else []
    lines += _bias(a, said)
    lines += _attend(a, said)
    if a.trap.on_heads:
        lines.append(TRAPS[a.trap])
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


def _project(a: ArchitectureSpec, said: Said) -> list[str]:
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


def _latent(a: ArchitectureSpec, said: Said) -> list[str]:
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


def _angles(a: ArchitectureSpec, of: str) -> list[str]:
    lines = [
        f"n = {of}.shape[-1] // 2",
        f"at = torch.arange(t, dtype={of}.dtype, device={of}.device)",
        f"angle = torch.outer(at, 10.0 ** -torch.arange(n, dtype={of}.dtype, device={of}.device))",
    ]
    if a.position is Position.ROTARY_PAIRS:
        return [*lines, "cos, sin = angle.cos(), angle.sin()"]
    return [*lines, "cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()"]


def _rotary(a: ArchitectureSpec) -> list[str]:
    match a.turning:
        case Turning.GENERATOR:
            return [*_angles(a, "q"), f"q, k = ({_turned(a)} for z in (q, k))"]
        case Turning.LINES:
            return [*_angles(a, "q"), *(f"{name} = {_turned(a, name)}" for name in "qk")]
        case Turning.FUNCTION:
            return ["q, k = @turn(q), @turn(k)"]
        case Turning.MODULE:
            return ["q, k = self.@turned(q), self.@turned(k)"]


def _turned(a: ArchitectureSpec, of: str = "z") -> str:
    if a.position is Position.ROTARY:
        return f"{of} * cos + torch.cat([-{of}[..., n:], {of}[..., :n]], -1) * sin"
    even, odd = f"{of}[..., ::2]", f"{of}[..., 1::2]"
    return f"torch.stack([{even} * cos - {odd} * sin, {even} * sin + {odd} * cos], -1).flatten(-2)"


def turning(a: ArchitectureSpec) -> list[str]:
    """Returns the code that turns queries and keys and stands outside of the attention."""
    if a.position not in ROTARY or a.projection is Projection.LATENT:
        return []
    body = ["t = z.shape[-2]", *_angles(a, "z"), f"return {_turned(a)}"]
    if a.turning is Turning.FUNCTION:
        return [f"def @turn(z):\n{indent(chr(10).join(body), ' ' * 4)}\n"]
    return [module("@Turned", [], "z", body)] if a.turning is Turning.MODULE else []


def _bias(a: ArchitectureSpec, said: Said) -> list[str]:
    """Lines that make `bias`, added to the scores before the softmax, from what positions need."""
    match a.position:
        case Position.ALIBI:
            heads = "q.shape[1]" if a.sizes is Sizes.SHAPES else said("heads")
            return [f"bias = ({slopes(heads)})[:, None, None] * ({steps()})"]
        case Position.ALIBI_MODEL:
            return ["bias = far"]
        case Position.RELATIVE:
            return [f"bias = self.@far(({steps()}).clamp(-3, 3) + 3).permute(2, 0, 1)"]
        case _:
            return []


def _attend(a: ArchitectureSpec, said: Said) -> list[str]:
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


def _softmax(a: ArchitectureSpec) -> list[str]:
    if Extra.SINK not in a.extras:
        return ['y = w.masked_fill(hidden, float("-inf")).softmax(-1) @ v']
    return [
        "sink = self.@sink.view(1, -1, 1, 1).expand(b, -1, t, 1)",
        'w = torch.cat([w.masked_fill(hidden, float("-inf")), sink], -1).softmax(-1)',
        "y = w[..., :-1] @ v",
    ]
