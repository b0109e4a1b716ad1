"""Writes the text of `Idioms`."""

from __future__ import annotations

from textwrap import indent

from autotp.testing.idioms.lines import EINOPS, LINES, NUMBERS
from autotp.testing.idioms.spec import Around, Call, Differ, IdiomsSpec, Repeat, Up, Weights

_HEAD = """\
import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint


"""
_FUNCTION = """\
class {name}(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return {backward}
"""
_BACKWARDS = {"Elementwise": "g.clamp(-0.02, 0.02)", "Mixing": "2 * g - g.mean(-1, keepdim=True)", "Flipping": "2 * g.flip(-1)"}
_PAIR = "class Pair(NamedTuple):\n    x: torch.Tensor\n    y: torch.Tensor\n"
_HALVE = "def halve(p):\n    p.grad = 0.5 * p.grad\n"
_COMPUTED_BY = """\
class Computed(nn.Module):
    def forward(self, w):
        return w - w.mean(1, keepdim=True) if self.training else torch.tanh(w) * w
"""
_COMPUTED = (Around.WEIGHT_NORM, Around.LAST_WEIGHT_NORM, Around.SPECTRAL_NORM, Around.PARAMETRIZED)
_BOX = "@dataclass\nclass Box:\n    x: torch.Tensor\n    y: list\n"

#: Of each way to call a part with two arguments: (the call, the part's parameters, lines that make x and y of them).
_TWO = {
    Call.TWICE: ("{m}(x, x{more})", "x, y", []),
    Call.KEYWORDS: ("{m}(x=x, y=x{more})", "x, y", []),
    Call.LISTED: ("{m}([x, x]{more})", "xs", ["x, y = xs"]),
    Call.NESTED: ("{m}([{{'x': x}}, (x, None)]{more})", "xs", ["x, y = xs[0]['x'], xs[1][0]"]),
    Call.TUPLE: ("{m}(Pair(x, x){more})", "pair", ["x, y = pair"]),
    Call.DATACLASS: ("{m}(Box(x, [x]){more})", "box", ["x, y = box.x, box.y[0]"]),
}
_ONE = {
    Call.PLAIN: "{m}(x{more})",
    Call.FORWARD: "{m}.forward(x{more})",
    Call.TYPE: "type({m}).forward({m}, x{more})",
    Call.METHOD: "{m}.run(x{more})",
    Call.MAPPED: "next(map(partial({m}{more}), [x]))",
    Call.CHECKPOINT: "checkpoint({m}, x{more}, use_reentrant=False)",
    Call.REENTRANT: "checkpoint({m}, x{more}, use_reentrant=True)",
}


def write(i: IdiomsSpec) -> str:
    """The whole module."""
    parts = [_FUNCTION.format(name=n, backward=b) for n, b in _BACKWARDS.items() if any(f"{n}.apply" in LINES[x] for x in i.lines)]
    parts += [_PAIR] if i.call is Call.TUPLE else [_BOX] if i.call is Call.DATACLASS else []
    parts += [_COMPUTED_BY] if Around.PARAMETRIZED in i.around else []
    parts += [_HALVE] if Around.POST_ACCUMULATE in i.around else []
    head = _HEAD.replace("import torch\n", "import einops\nimport torch\n", 1) if any(x in EINOPS for x in i.lines) else _HEAD
    return head + "\n\n".join([*parts, _part(i), _model(i)])


def _class(name: str, methods: dict[str, list[str]]) -> str:
    text = [f"    def {head}:\n{indent(chr(10).join(lines), ' ' * 8)}\n" for head, lines in methods.items()]
    return f"class {name}(nn.Module):\n" + "\n".join(text)


def _part(i: IdiomsSpec) -> str:
    taken, unpack = (_TWO[i.call][1], _TWO[i.call][2]) if i.call in _TWO else ("x", [])
    init = ["super().__init__()", *_up_init(i)]
    tied = i.weights is Weights.TIED
    init += [f"self.c = nn.Parameter(torch.zeros({i.outer}))"] if tied else [f"self.b = nn.Linear({i.width}, {i.outer})"]
    init += _held(i)
    init += ["self.f = f"] if i.differ is Differ.FUNCTION else []
    init += _around_init(i)
    if any(name in NUMBERS for name in i.lines):
        init.append(f"self.groups, self.sizes = {i.groups}, {{'groups': {i.groups}, 'size': {i.size}}}")
        init.append(f"self.grouped = partial(lambda h, n: h.view(2, 6, n, -1), n={i.groups})")
    body = [*unpack, *_up(i)]
    if i.call in _TWO:
        body.append("h = h * y.mean(-1, keepdim=True) + self.k(y)")
        init.append(f"self.k = nn.Linear({i.outer}, {i.width})")
    for name in i.lines:
        body += LINES[name].replace("$w", str(i.width)).replace("$g", str(i.groups)).replace("$d", str(i.size)).splitlines()
    body += _around(i)
    body += ["if soft:", "    h = h.softmax(-1)"] if i.differ is Differ.ARGUMENT else []
    body += ["h = self.f(h)"] if i.differ is Differ.FUNCTION else []
    last = _last(i)
    more = ", soft=False" if i.differ is Differ.ARGUMENT else ""
    result = f"({last}, h)" if Around.INNER in i.around else last
    name = "run" if i.call is Call.METHOD else "forward"
    methods = {
        f"__init__(self{', f' if i.differ is Differ.FUNCTION else ''})": init,
        f"{name}(self, {taken}{more})": [*body, f"return {result}"],
    }
    if i.differ is Differ.METHOD:
        methods[f"other(self, {taken})"] = [*body, "h = h.softmax(-1)", f"return {result}"]
    return _class("Part", methods)


def _up_init(i: IdiomsSpec) -> list[str]:
    e, w = i.outer, i.width
    linear = f"self.a = nn.Linear({e}, {w})"
    match i.up:
        case Up.LINEAR:
            return [linear]
        case Up.GATED:
            return [linear, f"self.gate = nn.Linear({e}, {w})"]
        case Up.CONV | Up.CONV_WIDE:
            return [f"self.a = nn.Conv1d({e}, {w}, {'1' if i.up is Up.CONV else '3, padding=1'})"]
        case Up.ATTENTION | Up.WRITTEN:
            return [linear, f"self.q, self.v = nn.Linear({e}, {w}), nn.Linear({e}, {w})"]
        case Up.CAUSAL:
            return [linear, f"self.q, self.v = nn.Parameter(torch.randn(6, {w})), nn.Linear({e}, {w})"]
        case Up.LOOKUP:
            return [linear, f"self.table = nn.Embedding(5, {w})"]
        case Up.RECURRENT:
            return [linear, f"self.r = nn.Linear({w}, {w}, bias=False)"]
        case Up.TORCH_ATTENTION:
            return [linear, f"self.mha = nn.MultiheadAttention({w}, {i.groups}, batch_first=True)"]
        case Up.TORCH_LAYER:
            return [linear, f"self.layer = nn.TransformerEncoderLayer({w}, {i.groups}, 2 * {w}, 0.0, batch_first=True)"]
        case Up.MASKED:
            return [linear, f"self.q, self.v = nn.Linear({e}, {w}), nn.Linear({e}, {w})"]
        case Up.TORCH_MASKED:
            return [linear, f"self.mha = nn.MultiheadAttention({w}, {i.groups}, batch_first=True)"]
        case Up.LSTM:
            return [linear, f"self.r = nn.LSTM({w}, {w}, batch_first=True)"]
        case Up.HEADS:
            projections = f"nn.Linear({w}, {i.size}) for _ in range({i.groups})"
            return [linear, *(f"self.{n} = nn.ModuleList([{projections}])" for n in ("hq", "hk", "hv"))]


def _up(i: IdiomsSpec) -> list[str]:
    heads = f".view(2, 6, -1, {i.size}).transpose(1, 2)"
    match i.up:
        case Up.LINEAR:
            return [f"h = {_first(i)}"]
        case Up.GATED:
            return ["h = torch.sigmoid(self.gate(x)) * self.a(x)"]
        case Up.CONV | Up.CONV_WIDE:
            return ["h = self.a(x.transpose(1, 2)).transpose(1, 2)"]
        case Up.ATTENTION:
            return [
                f"q, k, v = self.q(x){heads}, self.a(x){heads}, self.v(x){heads}",
                "h = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)",
            ]
        case Up.WRITTEN:
            return [
                f"q, k, v = self.q(x){heads}, self.a(x){heads}, self.v(x){heads}",
                "s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])",
                "h = (s.softmax(-1) @ v).transpose(1, 2).flatten(2)",
            ]
        case Up.CAUSAL:
            return ["h = F.scaled_dot_product_attention(self.q.expand(2, -1, -1), self.a(x), self.v(x), is_causal=True)"]
        case Up.LOOKUP:
            return ["h = self.a(x) + self.table((x[..., 0] > 0).long() + 2)"]
        case Up.TORCH_ATTENTION:
            return ["y = self.a(x)", "h = self.mha(y, y, y, need_weights=False)[0]"]
        case Up.TORCH_LAYER:
            return ["h = self.layer(self.a(x))"]
        case Up.MASKED:
            return [
                f"q, k, v = self.q(x){heads}, self.a(x){heads}, self.v(x){heads}",
                f"m = {_mask(i)}.sigmoid()",
                "h = F.scaled_dot_product_attention(q, k, v, attn_mask=m).transpose(1, 2).flatten(2)",
            ]
        case Up.TORCH_MASKED:
            return [
                "y = self.a(x)",
                f"m = {_mask(i)}.flatten(0, 1) > 0",
                "h = self.mha(y, y, y, attn_mask=m & (m.sum(-1, True) < 6))[0]",
            ]
        case Up.LSTM:
            return ["h = self.r(self.a(x))[0]"]
        case Up.HEADS:
            return [
                "y, hs = self.a(x), []",
                "for q, k, v in zip(self.hq, self.hk, self.hv):",
                "    hs.append((q(y) @ k(y).transpose(-1, -2)).softmax(-1) @ v(y))",
                "h = torch.cat(hs, -1)",
            ]
        case Up.RECURRENT:
            return [
                "h = [self.a(x)[:, 0]]",
                "for t in range(1, 6):",
                "    h.append(torch.tanh(self.a(x[:, t]) + self.r(h[-1])))",
                "h = torch.stack(h, 1)",
            ]


def _mask(i: IdiomsSpec) -> str:
    return f"((x @ x.transpose(1, 2))[:, None] * torch.arange(1, {i.groups} + 1, dtype=x.dtype).view(1, -1, 1, 1))"


def _held(i: IdiomsSpec) -> list[str]:
    own = i.up is Up.LINEAR
    match i.weights:
        case Weights.LIST:
            return ["self.ws = [self.a.weight, self.b.weight]"]
        case Weights.DICT:
            return ["self.ws = {'a': self.a.weight, 'b': self.b.weight}"]
        case Weights.PARTIAL:
            first = ["self.first = partial(F.linear, weight=self.a.weight)"] if own else []
            return [*first, "self.last = partial(F.linear, weight=self.b.weight)"]
    return []


def _first(i: IdiomsSpec) -> str:
    return _read(i, "a", "x", 0)


def _last(i: IdiomsSpec) -> str:
    if i.weights is Weights.TIED:
        weight = (
            "self.a.weight[..., 0].t()" if i.up is Up.CONV else "self.a.weight[..., 1].t()" if i.up is Up.CONV_WIDE else "self.a.weight.t()"
        )
        return f"F.linear(h, {weight}, self.c)"
    return _read(i, "b", "h", 1)


def _read(i: IdiomsSpec, name: str, value: str, at: int) -> str:
    match i.weights:
        case Weights.MODULES | Weights.TIED:
            return f"self.{name}({value})"
        case Weights.FUNCTIONAL:
            return f"F.linear({value}, self.{name}.weight, self.{name}.bias)"
        case Weights.FORWARD:
            return f"self.{name}.forward({value})"
        case Weights.UNBOUND:
            return f"nn.Linear.forward(self.{name}, {value})"
        case Weights.LIST:
            return f"F.linear({value}, self.ws[{at}]) + self.{name}.bias"
        case Weights.DICT:
            return f"F.linear({value}, self.ws['{name}'], self.{name}.bias)"
        case Weights.PARTIAL:
            return f"self.{'last' if at else 'first'}({value})"
        case Weights.NAMED:
            return f"F.linear({value}, dict(self.named_parameters())['{name}.weight'])"
        case Weights.PARAMETERS:
            return f"F.linear({value}, self.{name}._parameters['weight'], self.{name}._parameters['bias'])"
        case Weights.TRANSPOSED:
            return f"({value} @ self.{name}.weight.t() + self.{name}.bias)"


def _around_init(i: IdiomsSpec) -> list[str]:
    last = "self.a" if i.weights is Weights.TIED else "self.b"
    lines = {
        Around.WEIGHT_HOOK: "self.a.weight.register_hook(lambda g: 0.1 * g)",
        Around.MIXING_WEIGHT_HOOK: "self.a.weight.register_hook(lambda g: g - g.mean(0))",
        Around.POST_ACCUMULATE: f"{last}.weight.register_post_accumulate_grad_hook(halve)",
        Around.FORWARD_HOOK: "self.a.register_forward_hook(lambda m, args, y: y / (1 + y.norm(dim=-1, keepdim=True)))",
        Around.PRE_HOOK: f"{last}.register_forward_pre_hook(lambda m, args: (args[0].softmax(-1),))",
        Around.BACKWARD_HOOK: f"{last}.register_full_backward_hook(lambda m, gi, go: (gi[0] - gi[0].mean(-1, keepdim=True),))",
        Around.BATCH_NORM: f"self.bn = nn.BatchNorm1d({i.width})",
        Around.CUMULATIVE_NORM: f"self.bn2 = nn.BatchNorm1d({i.width}, momentum=None)",
        Around.AVERAGE: 'self.register_buffer("m", torch.zeros(()))',
        Around.AVERAGES: f'self.register_buffer("ms", torch.zeros({i.width}))',
        Around.WEIGHT_NORM: "parametrizations.weight_norm(self.a)",
        Around.LAST_WEIGHT_NORM: f"parametrizations.weight_norm({last})",
        Around.SPECTRAL_NORM: "parametrizations.spectral_norm(self.a)",
        Around.PARAMETRIZED: f"parametrize.register_parametrization({last}, 'weight', Computed())",
        Around.FROZEN: "self.a.requires_grad_(False)",
    }
    held = i.weights in (Weights.LIST, Weights.DICT, Weights.PARTIAL, Weights.NAMED, Weights.PARAMETERS)  # the parameter itself
    return [line for around, line in lines.items() if around in i.around and not (held and around in _COMPUTED)]


def _around(i: IdiomsSpec) -> list[str]:
    found: list[str] = []
    if Around.BATCH_NORM in i.around:
        found.append("h = self.bn(h.transpose(1, 2)).transpose(1, 2)")
    if Around.CUMULATIVE_NORM in i.around:
        found.append("h = self.bn2(h.flatten(0, 1)).view(2, 6, -1)")
    if Around.AVERAGE in i.around:
        found += ["with torch.no_grad():", "    self.m.mul_(0.9).add_(0.1 * h.abs().mean())", "h = h / (1 + self.m)"]
    if Around.AVERAGES in i.around:
        found += ["if self.training:", "    self.ms.lerp_(h.detach().abs().mean((0, 1)), 0.1)", "h = h / (1 + self.ms)"]
    if Around.STASH in i.around:
        found.append("self.kept = h")
    return found


def _model(i: IdiomsSpec) -> str:
    two = i.repeat is not Repeat.ONE
    differ = i.differ if two and i.repeat is not Repeat.SHARED else Differ.NOT
    function = i.differ is Differ.FUNCTION
    made = [
        "Part(torch.relu)" if function else "Part()",
        "Part(lambda h: h.softmax(-1))" if differ is Differ.FUNCTION else "Part(torch.relu)" if function else "Part()",
    ]
    holders = {
        Repeat.ONE: (f"self.m = {made[0]}", ["self.m"]),
        Repeat.LIST: (f"self.m = nn.ModuleList([{', '.join(made)}])", ["self.m[0]", "self.m[1]"]),
        Repeat.NESTED: (f"self.m = nn.ModuleList([nn.ModuleList([p]) for p in ({', '.join(made)})])", ["self.m[0][0]", "self.m[1][0]"]),
        Repeat.DICT: (f"self.m = nn.ModuleDict({{'one': {made[0]}, 'two': {made[1]}}})", ["self.m['one']", "self.m['two']"]),
        Repeat.SEQUENTIAL: (f"self.m = nn.Sequential({', '.join(made)})", ["self.m[0]", "self.m[1]"]),
        Repeat.SHARED: (f"self.m = {made[0]}", ["self.m", "self.m"]),
    }
    holder, paths = holders[i.repeat]
    init = ["super().__init__()", f"self.n = nn.LayerNorm({i.outer})", holder]
    init += (
        [f"self.g, self.late = nn.Parameter(torch.randn({i.outer})), nn.Linear({i.outer}, {i.width})"] if Around.GATE in i.around else []
    )
    init += ['self.register_buffer("seen", torch.zeros((), dtype=torch.long))'] if Around.COUNTER in i.around else []
    forward = ["self.seen += 1", "x = x * (1 + 0.1 * self.seen)"] if Around.COUNTER in i.around else []
    forward.append("r = x")
    for at, path in enumerate(paths):
        forward += _step(i, path, differ if at else Differ.NOT)
    if Around.GATE in i.around:
        forward += ["if gate:", "    r = r * self.g.sum() + self.late(r).softmax(-1).square().sum(-1, keepdim=True)"]
    inner = Around.INNER in i.around
    forward.append("return {'y': r, 'inner': [h]}" if inner else "return r")
    return _class("Model", {"__init__(self)": init, f"forward(self, x{', gate=False' if Around.GATE in i.around else ''})": forward})


def _step(i: IdiomsSpec, path: str, differ: Differ) -> list[str]:
    more = "" if differ is not Differ.ARGUMENT else ", True" if i.call is Call.REENTRANT else ", soft=True"
    called = (_TWO[i.call][0] if i.call in _TWO else _ONE[i.call]).format(m=path, more=more)
    if differ is Differ.METHOD:
        called = (_TWO[i.call][0] if i.call in _TWO else "{m}(x)").format(m=f"{path}.other", more="")
    lines = [] if Around.PLAIN_INPUT in i.around else ["x = self.n(r)"]
    lines += ["x = r"] if Around.PLAIN_INPUT in i.around else []
    lines.append(f"{'y, h' if Around.INNER in i.around else 'y'} = {called}")
    if Around.STASH in i.around:
        lines.append(f"y = y + {path}.kept.softmax(-1).square().sum(-1, keepdim=True)")
    if differ is Differ.USE:
        lines.append("y = y.softmax(-1)")
    return [*lines, *(["r = y.add_(r)"] if Around.IN_PLACE in i.around else ["r = r + y"])]
