"""`ParallelTokens` are hidden states of which each rank holds its rows, and that compute like whole ones.

They have the whole shape, so code that reads sizes for masks and positions sees those of one device. What treats tokens one by one runs
on the rows (`autotp.rewrite.sequence.operators`); any other operator gets the whole tensor, gathered on the spot. So every result is
that of one device.

    scattered   P → tokens      reduce-scatter / all-gather      leaves a region
    entered     tokens → R      all-gather / reduce-scatter      enters a region
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from autotp.errors import AutoTPError
from autotp.rewrite.collectives.conversions import ENTERED
from autotp.rewrite.in_parts.calls import Gathers, plainly, run
from autotp.rewrite.in_parts.tensor import PART, USED, Parted, check_views, part, part_of_gradient
from autotp.rewrite.sequence import operators
from autotp.rewrite.sequence.rows import Rows
from autotp.rewrite.transforms import direct


class ParallelTokens(Gathers):
    """See the module."""

    _kind: Rows
    noun, option = "hidden_states", "sequence_parallel=True"

    @classmethod
    def of(cls, local: Tensor, kind: Rows) -> ParallelTokens:
        width = local.shape[-1]
        made: ParallelTokens = torch.Tensor._make_wrapper_subclass(
            cls, (*kind.shape, width), dtype=local.dtype, device=local.device, requires_grad=False
        )
        made._local_tensor, made._kind = local.detach() if local.requires_grad else local, kind
        return made

    @classmethod
    def way(cls, func: Any) -> Callable[..., Any] | None:
        return operators.of(func)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        with plainly():
            return (_of_gradients if func in _GRADIENTS else run)(func, args, kwargs or {})

    def again(self, local: Tensor, kind: Rows) -> ParallelTokens:
        return tokens_of(local, kind)

    def forget(self) -> None:
        self.__dict__.pop("_entered", None)

    def enter(self) -> Tensor:
        """Returns the plain whole tensor for a region: its gradient is a summand on each rank. Collective."""
        with plainly():
            return entered(self)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ParallelTokens(shape={tuple(self.shape)}, dtype={self.dtype}, rows of this rank={self._local_tensor})"


#: Where tokens keep the rows that they were made of; those that are leaves have none, and gradients of their own.
_SOURCE = "_autotp_source"
_NODE: Any = Tensor.grad_fn.__get__  # type: ignore[union-attr]
_SET_GRAD: Any = Tensor.grad.__set__  # type: ignore[union-attr]
_GETTERS = frozenset(getattr(Tensor, name).__get__ for name in ("grad", "retains_grad", "_backward_hooks"))
#: What asks for the gradient of a tensor, or for hooks on it.
_GRADIENTS = frozenset((Tensor.register_hook, Tensor.retain_grad, torch.autograd.grad, _NODE, _SET_GRAD)) | _GETTERS


def _of_gradients(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Answers what asks for gradients of tokens: by those of the rows that everything goes on from."""
    if func is torch.autograd.grad:
        outputs, inputs, *rest = args if len(args) > 1 else (*args, kwargs["inputs"])
        given = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        more = {name: value for name, value in kwargs.items() if name != "inputs"}
        found = torch.autograd.grad(outputs, [_source(x) for x in given], *rest, **more)
        pairs = zip(given, found, strict=True)
        return tuple(g if g is None or _source(x) is x else tokens_of(g, x._kind) for x, g in pairs)  # type: ignore[union-attr]
    x = args[0]
    local = _source(x)
    if local is x:
        return func(*args, **kwargs)
    if func == _SET_GRAD:
        value = args[1]
        local.grad = part_of_gradient(value, x._kind) if isinstance(value, Tensor) else value
        return None
    if func == _NODE:
        return _pinned(x).grad_fn
    if func is Tensor.register_hook:
        hook = args[1] if len(args) > 1 else kwargs["hook"]

        def on_local(grad: Tensor) -> Tensor | None:
            changed = hook(tokens_of(grad, x._kind))
            return None if changed is None else part_of_gradient(changed, x._kind)

        return local.register_hook(on_local)  # type: ignore[no-untyped-call]
    found = func(local)
    return tokens_of(found, x._kind) if isinstance(found, Tensor) else found


def _pinned(x: ParallelTokens) -> ParallelTokens:
    """`x`, whose node in the graph of autograd every gradient passes from now on: someone asks for that node.

    Raises:
        AutoTPError: something went on from the rows already, and its gradients do not pass the node.
    """
    if USED in x.__dict__:
        raise AutoTPError(
            "hidden_states in parts (sequence_parallel=True) were used before their grad_fn was asked for (by a hook on nodes, a gradient "
            "edge): gradients of those uses do not pass it. Ask for it before they are used, or register a hook on the tensor"
        )
    for name in (PART, _SOURCE):
        x.__dict__.pop(name, None)
    return x


def _source(x: Tensor) -> Tensor:
    return x.__dict__.get(_SOURCE, x) if type(x) is ParallelTokens else x


class Again:
    """Gathers the rows of a region's input once more in the backward, for all products that need them for their weights' gradients.

    local: this rank's part, with its history. Where no product keeps it, it goes when the call ends: a view of the whole that something
    else keeps for the backward keeps all of this.
    """

    __slots__ = ("_found", "_left", "_task", "kind", "local", "users")

    def __init__(self, local: Tensor, kind: Rows) -> None:
        self.local: Tensor | None = local
        self.kind, self.users = kind, 0
        self._found: Tensor | None = None
        self._left, self._task = 0, -1

    def end(self) -> None:
        """The call has ended."""
        if not self.users:
            self.local = None

    def gathered(self, local: Tensor) -> Tensor:
        """[rows of this rank] as they were saved → the whole tensor, kept until all that saved it have asked in this backward."""
        task = torch._C._current_graph_task_id()
        if self._found is None or self._task != task:
            self._found, self._task, self._left = self.kind.join(local), task, self.users
        found = self._found
        self._left -= 1
        if self._left <= 0:
            self._found = None
        return found


class _Entered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, kind: Rows) -> Tensor:
        ctx.kind = kind
        found = kind.join(local)
        return found.data if found._is_view() else found  # a view made in here could not be changed in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if grad.requires_grad and torch.is_grad_enabled():
            return _SumOwn.apply(grad, ctx.kind), None  # type: ignore[no-untyped-call]
        return ctx.kind.sum(grad), None


class _SumOwn(torch.autograd.Function):
    """P → this rank's rows of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: Rows) -> Tensor:
        ctx.kind = kind
        return kind.sum(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return entered_rows(grad, ctx.kind), None


def entered_rows(local: Tensor, kind: Rows) -> Tensor:
    """The rows of this rank → the whole tensor, whose gradient is a summand on each rank."""
    if local.requires_grad and torch.is_grad_enabled():
        return _Entered.apply(local, kind)  # type: ignore[no-any-return, no-untyped-call]
    return kind.join(local)


def entered(x: ParallelTokens) -> Tensor:
    """See `ParallelTokens.enter`; consumers of the same tensor share one all-gather, and one reduce-scatter of their gradients."""
    records = x.requires_grad and torch.is_grad_enabled()
    if x.handed:
        check_views(x)
    held = x.__dict__.get("_entered")
    if held is not None and held[0] is records:
        return held[1]  # type: ignore[no-any-return]
    local = part(x)
    found = entered_rows(local, x._kind)
    if records:
        again = found.__dict__[ENTERED] = Again(local, x._kind)
        x._kind.comm.running.at_end.append(again.end)
    x.__dict__["_entered"] = records, found  # not in a table by weak references: what has one cannot be changed in place
    return found


def sum_own(x: Tensor, kind: Rows) -> Tensor:
    """A summand on each rank → this rank's rows of the sum."""
    if x.requires_grad and torch.is_grad_enabled():
        return _SumOwn.apply(x, kind)  # type: ignore[no-any-return, no-untyped-call]
    return kind.sum(x)


def scattered(x: Tensor, kind: Rows) -> ParallelTokens:
    """P → tokens: [*kind.shape, width], a summand on each rank."""
    return tokens_of(sum_own(x, kind), kind)


_parted = direct(Parted)


def tokens_of(local: Tensor, kind: Rows) -> ParallelTokens:
    """The tokens of which this rank holds `local`.

    What runs on rows goes on from `local` itself, so no step of the backward stands between two of them. Hooks and gradients of the tokens
    are those of `local` (see `_of_gradients`).
    """
    if not local.requires_grad or not torch.is_grad_enabled():
        return ParallelTokens.of(local, kind)
    x: ParallelTokens = _parted(ParallelTokens, kind, local)
    x.__dict__[PART] = x.__dict__[_SOURCE] = local  # until someone asks for its node
    return x
