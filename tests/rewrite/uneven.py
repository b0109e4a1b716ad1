"""A small model whose sizes nothing divides, with its plan: kv heads in pieces, fused queries beside one key, odd widths."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autotp.plan.conversions import Conversion, Op
from autotp.plan.expressions import Concat, Expr, Factor, Product, size
from autotp.plan.layout import Layout, replicated
from autotp.plan.spec import DistributedForm, GradSum, LocalAttribute, ModulePlan, ParamPlan, Slot, Use
from tests.rewrite.plans import COPY, REDUCE, embedding_site
from tests.rewrite.toys import site

DIM, WIDTH, INNER, VOCAB, HEADS = 2, 6, 7, 11, 3
ONCE = Conversion(Op.ONCE)


class Attention(nn.Module):
    """`kv` heads of `group` query heads each, with a slope for each query head."""

    def __init__(self, kv: int, group: int) -> None:
        super().__init__()
        self.kv, self.group = kv, group
        self.q = nn.Linear(WIDTH, kv * group * DIM)
        self.k = nn.Linear(WIDTH, kv * DIM)
        self.v = nn.Linear(WIDTH, kv * DIM)
        self.o = nn.Linear(kv * group * DIM, WIDTH)
        self.register_buffer("slopes", torch.arange(1.0, kv * group + 1).double())

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.kv, self.group, DIM)
        k, v = self.k(x).view(b, n, self.kv, DIM), self.v(x).view(b, n, self.kv, DIM)
        scores = torch.einsum("bqhgd,bkhd->bhgqk", q, k) / self.slopes.view(self.kv, self.group, 1, 1)
        # Not a softmax: it would leave the key's bias a gradient of rounding noise, which AdamW turns into steps.
        return self.o(torch.einsum("bhgqk,bkhd->bqhgd", scores.sigmoid(), v).flatten(2))


class MultiQuery(nn.Module):
    """The fused weight holds the queries of all heads, one key and one value."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = (HEADS * DIM, DIM, DIM)
        self.qkv = nn.Linear(WIDTH, sum(self.sizes))
        self.o = nn.Linear(HEADS * DIM, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split(self.sizes, -1)
        scores = torch.einsum("bqhd,bkd->bhqk", q.unflatten(-1, (-1, DIM)), k)
        return self.o(torch.einsum("bhqk,bkd->bqhd", scores.sigmoid(), v).flatten(2))


class Mlp(nn.Module):
    """Gated, with a normalised middle."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.scale = nn.Parameter(torch.ones(INNER))
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.gate(x)) * self.up(x)
        return self.down(F.rms_norm(x, (INNER,), self.scale, 1e-6))


class Uneven(nn.Module):
    """Returns logits; the head is tied to the embedding."""

    def __init__(self, kv: int, group: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.attention, self.multi, self.mlp = Attention(kv, group), MultiQuery(), Mlp()
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.double()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn_like(p) / 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in (self.attention, self.multi, self.mlp):
            x = x + block(x)
        return self.head(x)


def uneven_plan(model: Uneven, tp: int, pieces: int) -> tuple[dict[str, ParamPlan], list[ModulePlan]]:
    """What a planner should find, each kv head's group cut into `pieces`."""
    attention = model.attention
    kv = Factor("kv", attention.kv, True, pieces)
    group = Factor("group", attention.group, True, pieces, "kv")
    d, inner, vocab = Factor("d", DIM), Factor("inner", INNER, True), Factor("vocab", VOCAB, True)
    heads = Product((Factor("heads", HEADS, True), d))
    fused = Concat((heads, Factor("k", DIM), Factor("v", DIM)))
    q, k = Product((kv, group, d)), Product((kv, d))
    params = {n: ParamPlan(n, replicated(p.shape, tp)) for n, p in model.named_parameters(remove_duplicate=False)}

    def put(name: str, dim: int, expr: Expr) -> None:
        shape = tuple(model.get_parameter(name).shape)
        dims: list[Expr] = [expr if i == dim else Factor("e", n) for i, n in enumerate(shape)]
        params[name] = ParamPlan(name, Layout(shape, tuple(dims), tp))

    rows = (("attention.q", q), ("attention.k", k), ("attention.v", k), ("multi.qkv", fused), ("mlp.gate", inner), ("mlp.up", inner))
    columns = (("attention.o", q), ("multi.o", heads), ("mlp.down", inner))
    shared = ("attention.k", "attention.v", "multi.qkv")
    modules = []
    for path, expr in rows:
        put(f"{path}.weight", 0, expr)
        put(f"{path}.bias", 0, expr)
        uses = tuple(Use(path, name, GradSum.SHARED) for name in ("weight", "bias")) if path in shared else ()
        modules.append(ModulePlan(path, inputs=(Slot(("input",), (COPY,)),), uses=uses))
    for path, expr in columns:
        put(f"{path}.weight", 1, expr)
        modules.append(ModulePlan(path, outputs=(Slot((), (REDUCE,)),), uses=(Use(path, "bias", conversions=(ONCE,)),)))
    put("mlp.scale", 0, inner)
    for name in ("embed.weight", "head.weight"):
        put(name, 0, vocab)
    norm = site(Mlp.forward, "rms_norm", ints=((0, INNER, size(inner, tp)),), kernel=DistributedForm.RMS_NORM, over=inner)
    modules += [
        ModulePlan(
            "attention",
            uses=(Use("attention", "slopes", conversions=(Conversion(Op.SLICE, 0, Product((kv, group))),)),),
            attributes=(LocalAttribute("kv", kv.size, size(kv, tp)), LocalAttribute("group", group.size, size(group, tp))),
        ),
        ModulePlan("multi", attributes=(LocalAttribute("sizes.0", size(heads), size(heads, tp)),)),
        ModulePlan("mlp", sites=(norm,)),
        ModulePlan("embed", outputs=(Slot((), (REDUCE,)),), sites=(embedding_site(),)),
        ModulePlan("head", inputs=(Slot(("input",), (COPY,)),), outputs=(Slot((), (Conversion(Op.GATHER, -1, vocab),)),)),
    ]
    return params, modules
