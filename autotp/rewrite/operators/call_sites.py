"""Changes single operator calls inside a module's forward.

While a module with sites runs, a `TorchFunctionMode` gets each operator call, finds the line of model code that makes it, and acts
if the plan lists that place. Modules without sites never pay for a mode. Each thread has a stack of the modules that run. Only the
innermost one's sites act, so that a listed module called inside another handles its own calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from types import CodeType
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from autotp.errors import PlanError, sentence
from autotp.plan.conversions import Conversion
from autotp.plan.layout import Layout
from autotp.plan.spec import EVERY, Site
from autotp.rewrite.collectives.comm import Comm
from autotp.rewrite.collectives.conversions import Convert, bind_all
from autotp.rewrite.collectives.split import OTHER_PATH, OtherSize
from autotp.rewrite.operators.distributed import run_form
from autotp.rewrite.operators.statistics import Across
from autotp.rewrite.parameters.holders import now
from autotp.rewrite.tree import is_int, map_call, map_leaves
from autotp.trace.call_sites import call_of, call_place
from autotp.trace.opened import opened

# What code asks of a parameter itself, not of its values.
_OF_THE_PARAMETER = (
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "grad", "is_leaf", "grad_fn", "_backward_hooks")),
    *(getattr(Tensor, name).__set__ for name in ("requires_grad", "grad", "data", "_backward_hooks")),
    Tensor.register_hook,
    Tensor.requires_grad_,
)


#: Calls that fail where the sizes that they are given do not hold the elements that they got.
_VIEWS = frozenset(("view", "reshape"))


class _Running(threading.local):
    """The modes of the modules that run in this thread, innermost last (None: a module without sites)."""

    def __init__(self) -> None:
        self.modes: list[object] = []


RUNNING = _Running()


class SiteTable:
    """Looks the sites of one module up by code object and offset."""

    def __init__(self, sites: Sequence[Site], comm: Comm, where: str) -> None:
        self.comm = comm
        self.where = where
        self.sites = tuple(sites)
        self.across = {id(s): Across(comm, s.over, s.over_dim) for s in self.sites if s.kernel is not None}
        self._codes: dict[int, tuple[CodeType, dict[int, Site], dict[int, Site | None]]] = {}

    def find(self, code: CodeType, offset: int) -> Site | None:
        """Returns the site at `offset` of `code`, if listed."""
        known = self._codes.get(id(code))
        if known is None:
            key = (code.co_filename, code.co_qualname, code.co_firstlineno)
            listed = [s for s in self.sites if (s.file, s.function, s.line) == key]
            by_call = {call_of(code, s.offset): s for s in listed}
            known = self._codes[id(code)] = (code, by_call, {})
        _, by_call, seen = known
        if not by_call:
            return None
        if offset not in seen:
            seen[offset] = by_call.get(call_of(code, offset))
        return seen[offset]

    def __deepcopy__(self, memo: dict[int, Any]) -> SiteTable:
        return self


class SiteMode(TorchFunctionMode):
    """Acts on the calls that `table` lists; `layouts` gives the layout of the local tensors the module reads, by id.

    held: parameters that the code takes from elsewhere than its module's attributes, by id → the tensor that it computes with instead.
    """

    def __init__(self, table: SiteTable, layouts: Mapping[int, Layout], held: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.table = table
        self.layouts = layouts
        self.held = held

    def __enter__(self) -> SiteMode:
        RUNNING.modes.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        RUNNING.modes.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if RUNNING.modes[-1] is self:
            if (inside := opened(func)) is not None:
                with self:
                    return inside(*args, **kwargs)
            if self.held and func not in _OF_THE_PARAMETER:
                args, kwargs = map_call(args, kwargs, self._read)
            site = self.table.find(*call_place(2))
            if site is not None:
                return self._intervene(site, func, args, kwargs)
        return func(*args, **kwargs)

    def _read(self, leaf: Any) -> Any:
        return self.held.get(id(now(leaf)), leaf) if isinstance(leaf, Tensor) else leaf

    def _intervene(self, site: Site, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if site.ones:
            self._ones(site, args, kwargs)
        if site.sizes:
            self._expect(site, args, kwargs)
        if site.ints or site.multiples:
            args, kwargs = self._localise(site, args, kwargs)
        if site.inputs:
            self._count(site, site.given, (args, kwargs), "is given")
            try:
                args, kwargs = map_call(args, kwargs, _Nth(site.inputs, self.table.comm))
            except OtherSize as error:
                raise PlanError(
                    f"{self.table.where}: the call in {site.function} ({site.file}, function at line {site.line}) {OTHER_PATH}: {error}"
                ) from error
        if site.kernel is None:
            result = self._called(site, func, args, kwargs) if site.ints or site.multiples else func(*args, **kwargs)
        else:
            result = run_form(site.kernel, func, args, dict(kwargs), self.table.comm, self.layouts, self.table.across[id(site)])
        if site.outputs:
            self._count(site, site.made, result, "gives")
            result = map_leaves(result, _Nth(site.outputs, self.table.comm))
        return result

    def _count(self, site: Site, known: tuple[int, ...], tensors: Any, how: str) -> None:
        """Raises PlanError where a call is about another number of tensors than those that were traced, and their positions matter."""
        if known and (count := sum(isinstance(leaf, Tensor) for leaf in tree_leaves(tensors))) not in known:
            raise PlanError(
                f"{self.table.where}: the call in {site.function} ({site.file}, function at line {site.line}) {how} {count} tensors, "
                f"which are not all alike over the ranks; in the calls that were traced it was {' or '.join(map(str, known))}. Pass "
                "example_inputs of such a call to parallelize as well (a list of several calls)"
            )

    def _called(self, site: Site, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if getattr(func, "__name__", "") not in _VIEWS:
                raise
            raise PlanError(
                f"{self.table.where}: the call in {site.function} ({site.file}, function at line {site.line}) has numbers that were "
                f"changed for a rank's part, and got another tensor: no traced call took this path. Pass example_inputs that do, or hold "
                f"the numbers in attributes. {sentence(error)}"
            ) from error

    def _expect(self, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        found = _tensors(args, kwargs)
        for at, dim, local in site.sizes:
            shape = found[at].shape if at < len(found) else ()
            if -dim > len(shape) or shape[dim] != local:
                raise PlanError(
                    f"{self.table.where}: the call in {site.function} ({site.file}, function at line {site.line}) has a number in "
                    f"the code that was changed for a tensor with {local} in dim {dim}, and got one of shape {tuple(shape)}: no traced "
                    "call took this path. Pass example_inputs that do, or hold the number in an attribute"
                )

    def _ones(self, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        found = _tensors(args, kwargs)
        for at, dim in site.ones:
            shape = found[at].shape if at < len(found) else ()
            if -dim <= len(shape) and shape[dim] != 1:
                raise PlanError(
                    f"{self.table.where}: the call in {site.function} ({site.file}, function at line {site.line}) got a tensor of shape "
                    f"{tuple(shape)}; in the calls that were traced its dim {dim} had size 1, and stood for what each rank holds of a dim "
                    "that is cut. Pass example_inputs of such a call to parallelize as well (a list of several calls)"
                )

    def _localise(self, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        wanted = {position: (value, local, False) for position, value, local in site.ints}
        wanted |= {position: (value, local, True) for position, value, local in site.multiples}
        count = -1

        def replace(leaf: Any) -> Any:
            nonlocal count
            if not is_int(leaf):
                return leaf
            count += 1
            if count not in wanted:
                return leaf
            value, local, times = wanted.pop(count)
            if times and leaf % value == 0:
                return leaf // value * local
            if leaf != value:
                raise PlanError(
                    f"{self.table.where}: int argument {count} of the call in {site.function} ({site.file}, function at line "
                    f"{site.line}) is {leaf}; the plan was made for {f'multiples of {value}' if times else value}"
                )
            return local

        changed = map_call(args, kwargs, replace)
        if wanted:
            raise PlanError(
                f"{self.table.where}: the call in {site.function} ({site.file}, function at line {site.line}) has "
                f"{count + 1} int arguments; the plan wants to change number {sorted(wanted)}"
            )
        return changed


def _tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    map_call(args, kwargs, lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None)
    return found


class _Nth:
    """Applies conversions to the tensors at given positions, counting as it is mapped over leaves."""

    def __init__(self, wanted: Sequence[tuple[int, tuple[Conversion, ...]]], comm: Comm) -> None:
        self.wanted: dict[int, Convert] = {i: bind_all(conversions, comm) for i, conversions in wanted}
        self.every = self.wanted.get(EVERY)
        self.count = -1

    def __call__(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        self.count += 1
        convert = self.wanted.get(self.count, self.every)
        return leaf if convert is None else convert(leaf)
