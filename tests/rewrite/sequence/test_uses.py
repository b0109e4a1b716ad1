"""Models whose hidden states are in token parts give the outputs, gradients and tokens of one device, however they are used."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import autotp
from autotp.api import parallelize_as
from autotp.numeric.exact import DOUBLE
from autotp.plan.sequence_parallel import tokens_in_parts
from autotp.rewrite.sequence.tokens import ParallelTokens
from tests.composition.training import MODELS, adamw, apart, build, mesh_of
from tests.plan.test_sequence_parallel import Around
from tests.support.collectives import noted
from tests.support.ranks import Pool
from tests.support.slow import swept, thinned

Use = Callable[[Any], Any]


def ids(*shape: int) -> Tensor:
    return torch.randint(1, 40, shape, generator=torch.Generator().manual_seed(sum(shape)))


def ragged(model: Any) -> Any:
    """Lengths that no number of ranks divides, one token, and a padded batch."""
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[1, :2] = 0
    losses = [model(input_ids=ids(*shape), labels=ids(*shape)).loss for shape in ((2, 7), (1, 5), (1, 2))]
    one = model(input_ids=ids(1, 1)).logits.pow(2).sum()
    return [*losses, one, model(input_ids=ids(3, 5), attention_mask=mask, labels=ids(3, 5)).loss]


def asked_for(model: Any) -> Any:
    """Hidden states are whole for the caller, and so are their gradients."""
    out = model(input_ids=ids(2, 5), output_hidden_states=True, use_cache=False)
    assert all(type(t) is Tensor for t in tree_leaves(out))
    return [out.logits.pow(2).mean(), *(h.pow(3).mean() for h in out.hidden_states), out.hidden_states[1][:, 2].sum()]


def checkpointed(reentrant: bool) -> Use:
    def use(model: Any) -> Any:
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        runs: list[int] = []
        handle = model.get_input_embeddings().register_forward_hook(lambda *_: runs.append(1))
        inner = next(m for n, m in model.named_modules() if n.endswith(("layers.0", "h.0")))
        again = next(iter(inner.children())).register_forward_hook(lambda *_: runs.append(2))
        try:
            loss = model(input_ids=ids(2, 7), labels=ids(2, 7), use_cache=False).loss
            loss.backward()
            assert runs == [1, 2, 2], "the first block did not run again"
            return [loss]
        finally:
            handle.remove()
            again.remove()
            model.eval().gradient_checkpointing_disable()

    return use


def given_embeddings(model: Any) -> Any:
    """Embeddings of the caller's, whose gradient is whole."""
    x = torch.linspace(-1, 1, 2 * 5 * model.config.hidden_size, dtype=torch.float64).sin().view(2, 5, -1).requires_grad_()
    loss = model(inputs_embeds=x, use_cache=False).logits.pow(2).mean()
    (grad,) = torch.autograd.grad(loss, [x], retain_graph=True)
    return [loss, grad.detach()]


def base_alone(model: Any) -> Any:
    """The model without its head, called by itself."""
    return [model.base_model(input_ids=ids(2, 5)).last_hidden_state.pow(2).mean()]


def cached(model: Any) -> Any:
    """A prompt, and tokens after it, with gradients."""
    out = model(input_ids=ids(2, 5), use_cache=True)
    later = model(input_ids=ids(2, 1), past_key_values=out.past_key_values)
    return [out.logits.pow(2).mean(), later.logits.pow(2).mean()]


def hooked(model: Any) -> Any:
    """Hooks see tensors of the whole shape, and gradients of it."""
    seen: list[Any] = []
    named = [m for n, m in model.named_modules() if n.endswith(("layers.0", "h.0"))]
    handles = [m.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out)) for m in named]
    loss = model(input_ids=ids(2, 7), labels=ids(2, 7), use_cache=False).loss
    handles += [t.register_hook(lambda g: seen.append(g)) for t in list(seen)]
    loss.backward(retain_graph=True)
    for handle in handles:
        handle.remove()
    assert len(seen) == 2 and all(t.shape == (2, 7, model.config.hidden_size) for t in seen)
    return [loss, *(t.full_tensor() if isinstance(t, ParallelTokens) else t for t in (s.detach() for s in seen))]


def without_gradients(model: Any) -> Any:
    with torch.no_grad():
        logits = model(input_ids=ids(2, 7)).logits
    return [logits, model.generate(ids(1, 3), max_new_tokens=4, do_sample=False).double()]


USES: dict[str, Use] = {
    "ragged": ragged,
    "asked for": asked_for,
    "checkpointed": checkpointed(False),
    "checkpointed, reentrant": checkpointed(True),
    "given embeddings": given_embeddings,
    "base alone": base_alone,
    "cached": cached,
    "hooked": hooked,
    "without gradients": without_gradients,
}
#: Their norms compute in float32, and what widens that is not there in a backward that runs a block again.
CASTING = [kind for kind in MODELS if kind not in ("fused", "joint")]
#: "state space" has no cache of keys, and its blocks are called otherwise.
NOT_FOR = {kind: ("checkpointed", "checkpointed, reentrant") + ("cached", "hooked") * (kind == "state space") for kind in CASTING}


def observed(model: nn.Module, use: Use) -> dict[str, Tensor]:
    model.zero_grad()
    with DOUBLE.mode():
        results = use(model)
        losses = [r for r in results if r.requires_grad and r.ndim == 0]
        if losses and all(p.grad is None for p in model.parameters()):
            torch.stack(losses).sum().backward()
    is_parallel = hasattr(next(model.parameters()), "full_tensor")
    grads = autotp.full_grads(model) if is_parallel else {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {**{str(i): r.detach() for i, r in enumerate(results)}, **grads}


def compared(kind: str, tp: int) -> list[str]:
    """What is wrong with each use."""
    alone, mesh = build(kind).eval(), mesh_of(1, tp)
    model = autotp.parallelize(copy.deepcopy(alone), mesh, sequence_parallel=True, check="graph")
    assert tokens_in_parts(autotp.plan_of(model))
    said = []
    for name, use in USES.items():
        if name in NOT_FOR.get(kind, ()):
            continue
        wanted, ran = observed(alone, use), []
        with noted(lambda comm, kind, given, nbytes, ran=ran: ran.append(kind)):  # type: ignore[misc]
            got = observed(model, use)
        assert wanted.keys() == got.keys(), (name, wanted.keys() ^ got.keys())
        far = {n: float((wanted[n] - got[n]).abs().max() / wanted[n].abs().max().clamp(min=1e-3)) for n in got}
        if not max(far.values()) <= 1e-9:
            said.append(f"{name}: {far} apart")
        if ("reduce_scatter" in ran) is (name == "without gradients"):
            said.append(f"{name}: {ran.count('reduce_scatter')} sums were scattered")
    return said


TURNS = [(kind, 2 + at % 3) for at, kind in enumerate(MODELS)]


@pytest.mark.parametrize(
    ("kind", "tp"), thinned([(k, tp) for k in MODELS for tp in (2, 3, 4)], TURNS, ("even", 2), ("fused", 3), ("joint", 2), ("experts", 2))
)
def test_uses(pool: Pool, kind: str, tp: int) -> None:
    for said in pool.run(compared, kind, tp, world=tp):
        assert not said, "\n".join(said)


def trained(kind: str, tp: int) -> float:
    """Three steps of AdamW in training mode, with dropout where the model has it, and a step that is damaged on purpose."""
    alone, mesh = build(kind), mesh_of(1, tp)
    if kind == "fused":
        for name, m in alone.named_modules():
            if isinstance(m, nn.Dropout) and "attn_dropout" not in name:  # a rank draws for its own heads
                m.p = 0.3
    model = autotp.parallelize(copy.deepcopy(alone), mesh, sequence_parallel=True, check="graph")
    optimizers = adamw(alone), adamw(model)
    for step in range(3):
        for m, optimizer in zip((alone, model), optimizers, strict=True):
            torch.manual_seed(step)
            with DOUBLE.mode():
                m(input_ids=ids(2, 7 + step), labels=ids(2, 7 + step)).loss.backward()  # type: ignore[operator]
            optimizer.step()
            optimizer.zero_grad()
    return apart(alone.state_dict(), autotp.full_state_dict(model))


@pytest.mark.parametrize(
    ("kind", "tp"), thinned([(k, tp) for k in MODELS for tp in (2, 3)], [("padded", 2), ("tied", 3), ("experts", 2)], ("fused", 2))
)
def test_training(pool: Pool, kind: str, tp: int) -> None:
    assert max(pool.run(trained, kind, tp, world=tp)) <= 1e-9


# ---------------------------------------------------------------- modules of users


class Attention(nn.Module):
    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(16, 48), nn.Linear(16, 16), causal

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (t.view(b, s, 4, 4).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).reshape(b, s, 16))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))


class Block(nn.Module):
    """A block; `kind` says how its residuals and norms stand."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.attention, self.mlp = kind, Attention(kind != "encoder"), mlp()
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(4))
        self.gate = nn.Linear(16, 1)
        self.scale = nn.Parameter(torch.full((16,), 0.5))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        n = self.norms
        if self.kind == "parallel":
            return x + self.attention(n[0](x)) + self.mlp(n[0](x))
        if self.kind == "post":
            x = n[0](x + self.attention(x))
            return n[1](x + self.mlp(x))
        if self.kind == "sandwich":
            x = x + n[1](self.attention(n[0](x)))
            return x + n[3](self.mlp(n[2](x)))
        if self.kind == "modulated":
            shift, scale = condition.unsqueeze(1).chunk(2, -1)
            x = x + scale * self.attention(n[0](x) * (1 + scale) + shift)
            return x + torch.sigmoid(self.gate(x)) * self.mlp(n[1](x))
        if self.kind == "in place":
            y = self.attention(n[0](x))
            y += x
            z = self.mlp(n[1](y))
            return z.mul_(self.scale).add_(y)
        if self.kind == "flat":
            flat = (x + self.attention(x)).view(-1, 16)
            return (flat + self.mlp(n[0](flat))).view(x.shape)
        if self.kind == "reads sizes":
            x = x + self.attention(n[0](x)) / x.shape[1] ** 0.5
            return x + self.mlp(x - x.mean(1, keepdim=True)) * (x.size(1) / 7)
        x = x + self.attention(n[0](x)) * self.scale
        return x + F.dropout(self.mlp(n[1](x)), 0.1, self.training)


class Stack(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.start, self.blocks, self.end = nn.Linear(6, 16), nn.ModuleList(Block(kind) for _ in range(2)), nn.Linear(16, 3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = self.start(x)
        for block in self.blocks:
            x = block(x, condition)
        return self.end(x[:, 1:])


KINDS = ("plain", "parallel", "post", "sandwich", "modulated", "in place", "flat", "reads sizes", "encoder")


def users(kinds: tuple[str, ...], tp: int) -> list[str]:
    said = []
    for kind in kinds:
        torch.manual_seed(1)
        alone = Stack(kind).double()
        given = {"x": torch.randn(2, 7, 6, dtype=torch.float64), "condition": torch.randn(2, 32, dtype=torch.float64)}
        model = autotp.parallelize(copy.deepcopy(alone), mesh_of(1, tp), example_inputs=given, sequence_parallel=True)
        if not tokens_in_parts(autotp.plan_of(model)):
            said.append(f"{kind}: nothing is scattered")
        for rows in (2, 3):
            x, condition = torch.randn(rows, 5, 6, dtype=torch.float64), torch.randn(rows, 32, dtype=torch.float64)
            results = []
            for m in (alone, model):
                m.zero_grad()
                torch.manual_seed(rows)
                own = x.clone().requires_grad_()
                out = m(own, condition)
                out.pow(2).sum().backward()
                grads = autotp.full_grads(m) if m is model else {n: p.grad for n, p in m.named_parameters()}
                results.append({"out": out.detach(), "x": own.grad, **{n: g for n, g in grads.items() if g is not None}})
            assert results[0].keys() == results[1].keys()
            far = {n: float((t - results[1][n]).abs().max()) for n, t in results[0].items()}
            if not max(far.values()) <= 1e-9:
                said.append(f"{kind}: {far}")
    return said


@pytest.mark.parametrize("tp", swept([2, 3, 4], 2))
def test_modules_of_users(pool: Pool, tp: int) -> None:
    for said in pool.run(users, KINDS, tp, world=tp):
        assert not said, "\n".join(said)


def damaged() -> float:
    """The error where a module that mixes tokens is said to treat them one by one."""
    torch.manual_seed(1)
    alone = Around("tokens").double()
    x = torch.randn(3, 4, 8, dtype=torch.float64)  # a rank has one sequence and a half
    plan = autotp.plan(alone, tp=2, example_inputs={"x": x}, check="graph", sequence_parallel=True)
    wrong = replace(plan, tokens=replace(plan.tokens, by_token=frozenset({"norm"})))
    errors = [float((parallelize_as(copy.deepcopy(alone), mesh_of(1, 2), p)(x) - alone(x)).abs().max()) for p in (plan, wrong)]
    assert errors[0] <= 1e-9
    return errors[1]


def test_a_wrong_proof_is_seen(pool: Pool) -> None:
    assert min(pool.run(damaged)) > 1e-3
