"""Writes the text of an `Architecture`. `@name` in a template becomes a name without meaning."""

from __future__ import annotations

import random
import re
from textwrap import indent

from autotp.testing.architectures.attention import attention_forward, attention_init, turning
from autotp.testing.architectures.mlp import experts_forward, experts_init, mlp_forward, mlp_init
from autotp.testing.architectures.parts import module, slopes, steps, takes_far
from autotp.testing.architectures.spec import TOKENS, ArchitectureSpec, Experts, Extra, Norms, Position, Projection, Sizes, Trap

_HEAD = """\
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn


"""
_LETTERS = "bcdfghjklmnpqrstvwxz"


def write(a: ArchitectureSpec) -> str:
    """The whole module."""
    parts = [_norm(a), *turning(a)]
    if not a.inline:
        parts.append(module("@Mix", [*attention_init(a)], "x, far" if takes_far(a) else "x", attention_forward(a)))
    if not a.inline or a.experts is not Experts.NONE:
        parts.append(module("@Feed", mlp_init(a), "x", [*mlp_forward(a), "return z"]))
    if a.experts is not Experts.NONE:
        parts.append(module("@Pick", experts_init(a), "x", [*experts_forward(a), "return z"]))
    parts += [_block(a), _model(a)]
    return _named(_HEAD + "\n\n".join(parts), a.names)


def trapped(a: ArchitectureSpec) -> tuple[tuple[str, int], ...]:
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


def _norm(a: ArchitectureSpec) -> str:
    init = "self.weight = nn.Parameter(torch.ones(n))"
    if a.layer_norm:
        init += "\nself.bias = nn.Parameter(torch.zeros(n))"
        body = "return F.layer_norm(x, self.weight.shape, self.weight, self.bias)"
    else:
        body = "return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))"
    text = module("@Norm", init.splitlines(), "x", [body])
    return text.replace("def __init__(self)", "def __init__(self, n)")


def _block(a: ArchitectureSpec) -> str:
    norms = ["n1", *(["n2"] if not a.parallel else []), *(["n3", "n4"] if a.norms is Norms.BOTH else [])]
    init = [f"self.@{n} = @Norm({a.embedding})" for n in norms]
    far = ", far" if takes_far(a) else ""
    feed = "@Pick" if a.experts is not Experts.NONE else "@Feed"
    methods = ""
    if a.inline:
        init += attention_init(a)
        methods = f"\n    def @attend(self, x{far}):\n{indent(chr(10).join(attention_forward(a)), ' ' * 8)}\n"
        mix = f"self.@attend({{}}{far})"
        if a.experts is Experts.NONE:
            init += mlp_init(a)
            methods += f"\n    def @widen(self, x):\n{indent(chr(10).join([*mlp_forward(a), 'return z']), ' ' * 8)}\n"
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
    return module("@Block", init, f"x{far}", lines) + methods


def _model(a: ArchitectureSpec) -> str:
    init = [f"self.@embed = nn.Embedding({a.vocab}, {a.embedding})"]
    init += [f"self.@place = nn.Embedding(8, {a.embedding})"] if a.position is Position.LEARNED else []
    init += [f"self.@few = nn.Parameter(torch.randn({TOKENS}, {a.embedding}))"] if a.position is Position.LEARNED_FEW else []
    init += [f"self.@blocks = nn.ModuleList(@Block() for _ in range({a.layers}))", f"self.@last = @Norm({a.embedding})"]
    init.append(f"self.@head = nn.Linear({a.embedding}, {a.vocab}, bias={Extra.HEAD_BIAS in a.extras})")
    init += ["self.@head.weight = self.@embed.weight"] if a.tied else []
    forward = ["x = self.@embed(ids)", "t = ids.shape[1]"]
    forward += ["x = x + self.@place(torch.arange(t, device=ids.device))"] if a.position is Position.LEARNED else []
    forward += [f"x = x + self.@few if t == {TOKENS} else x"] if a.position is Position.LEARNED_FEW else []
    if takes_far(a):
        heads = str(a.heads) if a.sizes is not Sizes.ATTRIBUTES else "self.@heads"
        init += [f"self.@heads = {a.heads}"] if a.sizes is Sizes.ATTRIBUTES else []
        forward.append(f"far = ({slopes(heads)})[:, None, None] * ({steps()})")
    forward += [f"x = x * {a.embedding} ** 0.5"] if Extra.SCALED in a.extras else []
    called = f"block(x{', far' if takes_far(a) else ''})"
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
    return module("Model", init, "ids, targets" if a.loss else "ids", forward)
