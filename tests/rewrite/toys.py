"""A small model that has one of everything: fused weights, literals, shared config, buffers, parameters at the root."""

from __future__ import annotations

import dis
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autotp.plan.conversions import Conversion, Op
from autotp.plan.expressions import Concat, Factor, Product
from autotp.plan.layout import Layout, replicated
from autotp.plan.spec import DistributedForm, GradSum, LocalAttribute, ModulePlan, ParamPlan, Site, Slot, Use
from tests.rewrite.plans import COPY, REDUCE, embedding_site, even

HEADS, DIM = 4, 6
WIDTH = HEADS * DIM


class Config(SimpleNamespace):
    """Shared by all modules."""


class Attention(nn.Module):
    """Multi-query: the fused weight holds the queries of all heads, one key and one value."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.sizes = (WIDTH, DIM, DIM)
        self.qkv = nn.Linear(WIDTH, WIDTH + 2 * DIM)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.q_scale = nn.Parameter(torch.randn(DIM))
        self.register_buffer("slopes", torch.arange(1.0, HEADS + 1).double())

    def forward(self, x: Tensor, *, extra: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        b, n, _ = x.shape
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).split(self.sizes, -1)
        q = q.view(b, n, self.config.heads, DIM) * self.q_scale
        scores = torch.einsum("bqhd,bkd->bhqk", q, k) + self.slopes.view(1, -1, 1, 1)
        if extra is not None:
            scores = scores + extra["bias"]
        heads = torch.einsum("bhqk,bkd->bqhd", scores.softmax(-1), v)
        y = heads.reshape(b, n, 24)
        return F.linear(y, self.out.weight, self.out.bias), scores


class Block(nn.Module):
    """Attention and a normalised, sharded middle."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.up = nn.Linear(WIDTH, 32)
        self.norm = nn.LayerNorm(32)
        self.down = nn.Linear(32, WIDTH)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        y, _ = self.attention(x, extra={"bias": bias})
        return x + y + self.down(F.gelu(self.norm(self.up(x))))


class Toy(nn.Module):
    """Reads parameters of its own and ties its head to its embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = Config(heads=HEADS)
        self.config = config
        self.embed = nn.Embedding(16, WIDTH, padding_idx=9)
        self.position = nn.Parameter(torch.randn(1, 8, WIDTH))
        self.blocks = nn.ModuleList(Block(config) for _ in range(2))
        self.double()

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids) + self.position[:, : ids.shape[1]]
        bias = torch.arange(HEADS, dtype=x.dtype).view(HEADS, 1, 1) / 7
        for block in self.blocks:
            x = block(x, bias)
        return {"logits": F.linear(x, self.embed.weight)}


def site(function: Any, name: str, **changes: Any) -> Site:
    """The call of the method or function `name` in `function` (the last, should there be several)."""
    instructions = list(dis.get_instructions(function.__code__))
    at = max(i for i, x in enumerate(instructions) if x.argval == name and x.opname in ("LOAD_METHOD", "LOAD_ATTR"))
    depth = next(i for i in range(at, len(instructions)) if instructions[i].opname == "CALL")
    code = function.__code__
    return Site(code.co_filename, code.co_qualname, code.co_firstlineno, instructions[depth].offset, **changes)


def toy_plan(model: Toy, tp: int = 2) -> tuple[dict[str, ParamPlan], list[ModulePlan]]:
    """What a planner should find."""
    heads = Factor("heads", HEADS, sharded=True)
    q = Product((heads, Factor("d", DIM)))
    fused = Concat((q, Factor("k", DIM), Factor("v", DIM)))
    params = {n: ParamPlan(n, replicated(p.shape, tp)) for n, p in model.named_parameters(remove_duplicate=False)}

    def put(name: str, layout: Layout) -> None:
        params[name] = ParamPlan(name, layout)

    modules = [
        ModulePlan(
            "",
            uses=(Use("embed", "weight"),),
            outputs=(Slot(("logits",), (Conversion(Op.GATHER, -1, Factor("v", 16, sharded=True)),)),),
            sites=(_head_site(),),
        ),
        ModulePlan("embed", outputs=(Slot((), (REDUCE,)),), sites=(embedding_site(),)),
    ]
    put("embed.weight", even((16, WIDTH), 0, tp))
    for path, block in model.named_modules():
        if not isinstance(block, Block):
            continue
        a = f"{path}.attention"
        put(f"{a}.qkv.weight", Layout((WIDTH + 2 * DIM, WIDTH), (fused, Factor("e", WIDTH)), tp))
        put(f"{a}.qkv.bias", Layout((WIDTH + 2 * DIM,), (fused,), tp))
        put(f"{a}.out.weight", Layout((WIDTH, WIDTH), (Factor("e", WIDTH), q), tp))
        for name, shape, dim in (("up.weight", (32, WIDTH), 0), ("up.bias", (32,), 0), ("norm.weight", (32,), 0),
                                 ("norm.bias", (32,), 0), ("down.weight", (WIDTH, 32), 1)):  # fmt: skip
            put(f"{path}.{name}", even(shape, dim, tp))
        modules += [
            ModulePlan(
                a,
                inputs=(Slot(("x",), (COPY,)), Slot(("extra", "bias"), (Conversion(Op.SLICE, 0, heads),))),
                outputs=(Slot((0,), (REDUCE,)), Slot((1,), (Conversion(Op.GATHER, 1, heads),))),
                uses=(
                    Use(f"{a}.qkv", "weight", GradSum.SHARED),
                    Use(f"{a}.qkv", "bias", GradSum.SHARED),
                    Use(f"{a}.out", "weight"),
                    Use(f"{a}.out", "bias", conversions=(Conversion(Op.ONCE),)),
                    Use(a, "q_scale", GradSum.ALL),
                    Use(a, "slopes", conversions=(Conversion(Op.SLICE, 0, heads),)),
                ),
                attributes=(LocalAttribute("config.heads", HEADS, HEADS // tp), LocalAttribute("sizes.0", WIDTH, WIDTH // tp)),
                sites=(site(Attention.forward, "reshape", ints=((2, WIDTH, WIDTH // tp),)),),
            ),
            ModulePlan(f"{path}.up", inputs=(Slot(("input",), (COPY,)),)),
            ModulePlan(
                f"{path}.norm",
                sites=(site(nn.LayerNorm.forward, "layer_norm", ints=((0, 32, 32 // tp),), kernel=DistributedForm.LAYER_NORM),),
            ),
            ModulePlan(
                f"{path}.down",
                outputs=(Slot((), (REDUCE,)),),
                uses=(Use(f"{path}.down", "bias", conversions=(Conversion(Op.ONCE),)),),
            ),
        ]
    return params, modules


def _head_site() -> Site:
    return site(Toy.forward, "linear", inputs=((0, (COPY,)),))
