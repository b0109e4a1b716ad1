"""Modules of `holes` about state, weights, gradients and hooks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.models.holes_parts import OUTER, Elementwise, Flipping, Mid, Mixing, RmsNorm


class Convolved(nn.Module):
    """A BatchNorm between convolutions: a running mean of what is sharded."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Conv1d(6, 12, 1), nn.BatchNorm1d(12, momentum=momentum), nn.Conv1d(12, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.n(self.a(x))))


class NormedPairs(nn.Module):
    """BatchNorms with a cumulative mean, in nested lists."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.ModuleList([nn.ModuleList([nn.Conv1d(6, 6, 1), nn.BatchNorm1d(6, momentum=None)]) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for c, n in self.l:
            x = x + n(c(x))
        return x


class Averaged(Mid):
    """A moving average of one number, or of each entry."""

    def __init__(self, each: bool, always: bool = True) -> None:
        super().__init__()
        self.always = always
        self.register_buffer("m", torch.zeros(12 if each else ()))

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.a(x))
        if self.always or self.training:
            with torch.no_grad():
                self.m.mul_(0.9).add_(0.1 * (y.abs().mean((0, 1)) if self.m.dim() else y.abs().mean()))
        return self.b(y / (1 + self.m))


class Counted(Mid):
    """A counter that the second call sees, as a buffer and as an int."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.calls += 1
        return super().forward(x) * (1 + 0.1 * self.seen) + 0.1 * self.calls


class Replaced(Mid):
    """A buffer that is assigned, not written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        y = self.b(torch.tanh(h + self.last))
        self.last = h.detach().mean((0, 1))
        return y


class Held(Mid):
    """Weights that something else holds too; `hold` says what."""

    def __init__(self, hold: str) -> None:
        super().__init__()
        self.hold = hold
        self.ws = [self.a.weight, self.b.weight]
        self.named = {"a": self.a.weight, "b": self.b.weight}
        first = self.a.weight
        self.closure = partial(F.linear, weight=first)

    def forward(self, x: Tensor) -> Tensor:
        match self.hold:
            case "list":
                return F.linear(F.gelu(F.linear(x, self.ws[0])), self.ws[1])
            case "dict":
                return F.linear(F.gelu(F.linear(x, self.named["a"])), self.named["b"])
            case "closure":
                return self.b(F.gelu(self.closure(x)))
            case "named_parameters":
                p = dict(self.named_parameters())
                return F.linear(F.gelu(F.linear(x, p["a.weight"], p["a.bias"])), p["b.weight"])
            case "parameters":
                a, _, b, _ = self.parameters()
                return F.linear(F.gelu(F.linear(x, a)), b)
            case "_parameters":
                return self.b(F.gelu(F.linear(x, self.a._parameters["weight"])))
            case "state_dict":
                return self.b(F.gelu(F.linear(x, self.state_dict(keep_vars=True)["a.weight"])))
            case "data":
                return self.b(F.gelu(F.linear(x, self.a.weight.data)))
            case "getattr":
                return self.b(F.gelu(F.linear(x, getattr(self.a, "wei" + "ght"))))
        raise AssertionError(self.hold)


class Decoded(nn.Module):
    """The decoder's weight is that of another module, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Mid(), nn.Linear(OUTER, 12)

    def forward(self, x: Tensor) -> Tensor:
        h = self.last(self.first(x))
        return F.linear(F.relu(h), self.first.a.weight.t()) + h @ self.first.a.weight


class Tied(Mid):
    """The second weight is the first, transposed, in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(12, OUTER, bias=False)
        self.c = nn.Linear(OUTER, 12)
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.a(x)) * self.c(x).sigmoid())


class Hooked(Mid):
    """A hook that was registered before."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        match kind:
            case "weight":
                self.a.weight.register_hook(lambda g: 0.1 * g)
            case "weight_mixing":
                self.a.weight.register_hook(lambda g: g - g.mean(0))
            case "bias":
                self.b.bias.register_hook(lambda g: g.clamp(-0.1, 0.1))
            case "post_accumulate":
                self.b.weight.register_post_accumulate_grad_hook(_halved)
            case "forward":
                self.a.register_forward_hook(lambda m, args, y: F.normalize(y, dim=-1))
            case "forward_elementwise":
                self.a.register_forward_hook(lambda m, args, y: y * 2)
            case "pre":
                self.b.register_forward_pre_hook(lambda m, args: (args[0].softmax(-1),))
            case "backward":
                self.b.register_full_backward_hook(lambda m, gi, go: (gi[0] - gi[0].mean(-1, keepdim=True),))
            case "backward_pre":
                self.a.register_full_backward_pre_hook(lambda m, go: (go[0].flip(-1),))


def _halved(p: Tensor) -> None:
    assert p.grad is not None
    p.grad.mul_(0.5)


class Asking(Mid):
    """Code that asks how it is run."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        asked = {
            "grad": torch.is_grad_enabled(),
            "requires": h.requires_grad,
            "training": self.training,
            "weight": self.a.weight.requires_grad,
        }
        return self.b(h.softmax(-1) if asked[self.what] else h)


class Gated(Mid):
    """Parameters that only another call reads."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.randn(OUTER))
        self.late = nn.Linear(OUTER, 12)

    def forward(self, x: Tensor, gate: bool = False) -> Tensor:
        y = super().forward(x)
        return y * self.g.sum() + self.late(x).softmax(-1).sum(-1, keepdim=True) if gate else y


class TensorHook(Mid):
    """A hook on an activation, registered in forward."""

    def __init__(self, hook: Callable[[Tensor], Tensor], whole: bool = False) -> None:
        super().__init__()
        self.hook, self.whole = hook, whole

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        y = self.b(F.gelu(h))
        seen = y if self.whole else h
        if seen.requires_grad:
            seen.register_hook(self.hook)
        return y * 1


class Recomputed(nn.Module):
    """Checkpoints around a part, or inside of it."""

    def __init__(self, reentrant: bool, inside: bool = False) -> None:
        super().__init__()
        self.m, self.n, self.reentrant, self.inside = Mid(F.gelu), Mid(F.gelu), reentrant, inside

    def forward(self, x: Tensor) -> Tensor:
        if self.inside:
            h = self.m.a(x)
            return self.m.b(checkpoint(lambda h: F.gelu(h) * h, h, use_reentrant=self.reentrant))
        x = self.n(x)
        return x + checkpoint(self.m, x, use_reentrant=self.reentrant)


class Causal(nn.Module):
    """A causal mask over learned queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Parameter(torch.randn(12, OUTER)), nn.Linear(OUTER, OUTER), nn.Linear(OUTER, OUTER)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.q.expand(x.shape[0], -1, -1)
        return F.scaled_dot_product_attention(queries, self.k(x), self.v(x), is_causal=True).mean(1)


class Sparse(Mid):
    """A sparse buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("m", torch.eye(4).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.m.coalesce().values().sum()


class Lookups(nn.Module):
    """Tables of which nothing divides the rows, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.m, self.head = nn.Embedding(13, OUTER), Mid(F.gelu), nn.Linear(OUTER, 13)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.m(self.e(ids)))


class Frozen(Mid):
    """Weights without gradients."""

    def __init__(self) -> None:
        super().__init__(F.gelu)
        self.a.requires_grad_(False)


def _clamped(g: Tensor) -> Tensor:
    return g.clamp(-0.02, 0.02)


def _centred(g: Tensor) -> Tensor:
    return g - g.mean(-1, keepdim=True)


FACTORIES: dict[str, Callable[[], nn.Module]] = {
    "batch_norm": Convolved,
    "batch_norm_cumulative": partial(Convolved, None),
    "batch_norm_in_nested_lists": NormedPairs,
    "average_of_a_number": partial(Averaged, False),
    "average_of_entries": partial(Averaged, True),
    "average_in_training": partial(Averaged, True, False),
    "counters": Counted,
    "buffer_assigned": Replaced,
    **{
        f"weights_by_{hold.strip('_')}{'_' * hold.startswith('_')}": partial(Held, hold)
        for hold in ("list", "dict", "closure", "named_parameters", "parameters", "_parameters", "state_dict", "data", "getattr")
    },
    "weight_of_another_module": Decoded,
    "tied_weights": Tied,
    **{
        f"hook_{kind}": partial(Hooked, kind)
        for kind in (
            "weight",
            "weight_mixing",
            "bias",
            "post_accumulate",
            "forward",
            "forward_elementwise",
            "pre",
            "backward",
            "backward_pre",
        )
    },
    **{f"asks_{what}": partial(Asking, what) for what in ("grad", "requires", "training", "weight")},
    "gate": Gated,
    "tensor_hook_elementwise": partial(TensorHook, _clamped),
    "tensor_hook_mixing": partial(TensorHook, _centred),
    "tensor_hook_on_a_whole_value": partial(TensorHook, _centred, True),
    "function_elementwise": partial(Mid, Elementwise.apply),
    "function_mixing": partial(Mid, Mixing.apply),
    "function_flipping": partial(Mid, Flipping.apply),
    "function_rms_norm": partial(Mid, RmsNorm.apply),
    "function_in_groups": partial(Mid, lambda h: RmsNorm.apply(h.view(2, 6, 3, 4)).flatten(2)),
    "checkpoint": partial(Recomputed, False),
    "checkpoint_reentrant": partial(Recomputed, True),
    "checkpoint_inside": partial(Recomputed, False, True),
    "causal_learned_queries": Causal,
    "sparse_buffer": Sparse,
    "frozen": Frozen,
}
SHARDED = frozenset(
    {"sparse_buffer", "weights_by_getattr", "checkpoint", "checkpoint_reentrant", "checkpoint_inside", "frozen", "hook_weight", "gate"}
)
MORE: dict[str, dict[str, dict[str, Any]]] = {"gate": {"with the gate": {"gate": True}}}
ALIKE = frozenset(
    {
        "batch_norm_cumulative",
        "average_in_training",
        "weights_by_dict",
        "weights_by_parameters",
        "weights_by_state_dict",
        "weights_by_getattr",
        "hook_bias",
        "hook_forward_elementwise",
        "hook_backward_pre",
        "asks_requires",
        "function_flipping",
        "function_in_groups",
        "tensor_hook_on_a_whole_value",
        "checkpoint_reentrant",
    }
)
