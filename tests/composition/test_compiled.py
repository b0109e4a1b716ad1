"""A model under torch.compile whose graph breaks: at calls that the plan changes, which are known in eager code only."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import autotp
from autotp.errors import AutoTPError
from autotp.plan.loss_parallel import logits_in_parts
from autotp.plan.sequence_parallel import tokens_in_parts
from tests.composition.training import apart, mesh_of
from tests.support.ranks import Pool

WIDTH, HEADS, VOCAB = 12, 4, 16


class Attention(nn.Module):
    """Computes the size of a head from whole numbers in the code, so that the plan changes a call in it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), HEADS

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = (t.view(B, T, self.heads, C // self.heads).transpose(1, 2) for t in self.qkv(x).split(C, dim=2))
        y = (q @ k.mT).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(B, T, C))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU()), nn.Linear(24, WIDTH))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(x))
        return x + self.mlp(x)  # type: ignore[no-any-return]


class Decoder(Attention):
    """With attention of its own in front of its blocks: then its head runs in eager code."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, ids: Tensor) -> Tensor:
        x = super().forward(self.embed(ids))
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


def ids(step: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (2, 6), generator=torch.Generator().manual_seed(step))


def pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    """(the model on one device, the same over two ranks), where the plan changes calls in attention; nothing is compiled yet."""
    torch.compiler.reset()
    torch.manual_seed(0)
    alone = Decoder().double().eval()
    model = autotp.parallelize(copy.deepcopy(alone), mesh_of(1, 2), example_inputs={"ids": ids()}, check="graph", **options)
    plan = autotp.plan_of(model)
    assert any(m.sites for m in plan.modules if m.path == "blocks.0.attention")
    assert bool(tokens_in_parts(plan)) is ("sequence_parallel" in options) and bool(logits_in_parts(plan)) is ("loss_parallel" in options)
    return alone, model


def step(model: nn.Module, loss_of: Any, called: Any, grads: Any) -> dict[str, Tensor]:
    """The loss of a step and its gradients, and logits that record none."""
    model.zero_grad()
    loss = loss_of(called, ids(1), ids(2))
    loss.backward()
    with torch.no_grad():
        return {"loss": loss.detach(), "logits": called(ids(3)), **grads(model)}


def loss_of(called: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(called(tokens).flatten(0, 1), labels.flatten())


def steps(backend: str, options: tuple[str, ...]) -> dict[str, float]:
    """How far calls of a compiled model and of a compiled loss are from one device, before and after calls that are not compiled."""
    alone, model = pair(**dict.fromkeys(options, True))
    wanted = step(alone, loss_of, alone, lambda m: {n: p.grad for n, p in m.named_parameters()})
    compiled, loss = (torch.compile(f, backend=backend) for f in (model, loss_of))
    ways = {"compiled": (loss_of, compiled), "plain": (loss_of, model), "loss": (loss, model), "again": (loss_of, compiled)}
    return {name: apart(wanted, step(model, *way, autotp.full_grads)) for name, way in ways.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("backend", "options"), [("eager", ()), ("aot_eager", ("sequence_parallel", "loss_parallel"))])
def test_breaks_at_call_sites(pool: Pool, backend: str, options: tuple[str, ...]) -> None:
    for found in pool.run(steps, backend, options, timeout=150.0):
        assert max(found.values()) <= 1e-9, found


def guarded() -> dict[str, str]:
    """What is said of calls that must be refused, compiled as they are."""
    model: Any = pair()[1]
    x = torch.randn(2, 6, WIDTH, dtype=torch.float64)
    block, said = model.blocks[0], {}
    hidden = block.mlp[0]
    for name, inner in {"leaf": hidden[0], "row": block.attention.out, "inner": hidden, "function": lambda x: hidden[0](x)}.items():
        with pytest.raises(AutoTPError) as caught:
            torch.compile(inner, backend="eager")(x)
        said[name] = str(caught.value)
    run = torch.compile(model, backend="eager")
    run(ids())
    block.attention.heads = 1
    with pytest.raises(AutoTPError) as caught:
        run(ids())
    said["changed"] = str(caught.value)
    return said


@pytest.mark.filterwarnings("ignore")
def test_guards(pool: Pool) -> None:
    """A module that takes or gives parts is refused by itself; a changed model is refused in calls whose graph breaks."""
    for said in pool.run(guarded, timeout=150.0):
        assert all("outside of a call of the model" in said[name] for name in ("leaf", "row", "inner", "function")), said
        assert "heads" in said["changed"], said


def drawn() -> list[Tensor]:
    """Two compiled calls in training mode, on ranks whose generators differ before."""
    model = pair()[1].train()
    run = torch.compile(model, backend="eager")
    torch.manual_seed(dist.get_rank())
    return [run(ids()).detach() for _ in range(2)]


@pytest.mark.filterwarnings("ignore")
def test_ranks_draw_the_same(pool: Pool) -> None:
    (first, second), others = pool.run(drawn, timeout=150.0)
    assert torch.equal(first, others[0]) and torch.equal(second, others[1])
    assert not torch.equal(first, second)
