"""Refuses calls of code on parts in a form that was not traced: for another flag the code may take a path that no trace covers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from enum import Enum
from typing import Any, cast

import torch
from torch import Tensor, nn

from autotp.errors import AutoTPError
from autotp.hugging_face import is_hugging_face
from autotp.plan.plan import Plan
from autotp.plan.spec import Call, Forms
from autotp.rewrite.modules.classes import BASE, check_calls
from autotp.rewrite.undo import Undo
from autotp.trace.forms import NUMBER, SAME, TENSOR, Signature, any_dims, kind_of, switches
from autotp.trace.opened import runs_opened

_MOST_KNOWN = 256
_BY_VALUE = frozenset((bool, int, str))
_EXAMPLES = "Pass example_inputs of such a call to parallelize as well (a list of several calls)"


class Called:
    """The forms in which one module was traced. `known`: the calls that were checked and are right.

    `only_switches`: only arguments that switch something on are checked, each by itself.
    """

    __slots__ = ("forms", "identity", "kinds", "known", "only_switches", "signature", "token", "where")

    def __init__(self, where: str, signature: Signature, forms: Forms, *, only_switches: bool) -> None:
        self.where, self.signature, self.forms, self.only_switches = where, signature, forms, only_switches
        self.token: Callable[[Any], Hashable] = _switch if only_switches else _token
        self.known: set[Hashable] = set()
        kinds: dict[str, set[str]] = {}
        for name, kind in (pair for call in forms for pair in call):
            kinds.setdefault(name, set()).add(kind)
        self.kinds: Mapping[str, frozenset[str]] = {name: frozenset(found) for name, found in kinds.items()}
        self.identity = SAME in self.kinds

    def check(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> AutoTPError | None:
        """Raise where an argument is of a kind that no traced call had, or where none had those of this call together.

        Returns:
            The error to raise when the call is through. A tensor of another class of numbers where one is required may be wrong for
                one device too (flags for ids): then the code raises its own error, as it does there.

        Raises:
            AutoTPError: names the arguments.
        """
        token = self.token
        same = self.signature.same(args, kwargs) if self.identity else ""
        call = (tuple([token(v) for v in args]), tuple([(n, token(v)) for n, v in kwargs.items()]), same)
        if call in self.known:
            return None
        late = self._check(args, kwargs)
        if late is None and len(self.known) < _MOST_KNOWN:
            self.known.add(call)
        return late

    def _check(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> AutoTPError | None:
        own = self.only_switches
        kinds = self.signature.kinds_of(args, kwargs, shallow=own)
        as_sizes = self.signature.kinds_of(args, kwargs, sizes=True, shallow=own)
        if self.identity:
            kinds[SAME] = as_sizes[SAME] = self.signature.same(args, kwargs)
        found: set[tuple[str, str]] = set()
        for name, kind in kinds.items():
            traced = self.kinds.get(name, frozenset())
            forms = (kind, as_sizes[name], any_dims(kind), *((NUMBER,) if kind.lstrip("-").isdigit() else ()))
            known = next((k for k in forms if k in traced), None)
            if known is None and (not own or (switches(kind) and self.signature.names_it(name))):
                were = f"had {' or '.join(_told(name, k) for k in sorted(traced))}" if traced else f"did not have {name}"
                refusal = self._refusal(f"with {_told(name, kind)}; the calls that were traced {were}")
                if name not in self.signature.kinds and kind.startswith(TENSOR) and _of_its_dims(kind, traced):
                    return refusal
                raise refusal
            found.add((name, known or kind))
        if not own and found not in self.forms:
            raise self._not_together(frozenset(found))
        return None

    def _not_together(self, call: Call) -> AutoTPError:
        nearest = min(self.forms, key=lambda form: (len(form ^ call), sorted(form)))
        given = " and ".join(_told(name, kind) for name, kind in sorted(call - nearest))
        missing = " and ".join(sorted({name for name, _ in nearest} - {name for name, _ in call}))
        ways = [f"with {given}" if given else "", f"without {missing}" if missing else ""]
        return self._refusal(f"{' and '.join(filter(None, ways))}; each of its arguments was traced so, but not together with the others")

    def _refusal(self, call: str) -> AutoTPError:
        return AutoTPError(
            f"{self.where} is called {call}. Its code computes on a rank's part, and may take a path that the plan was not made for. "
            f"{_EXAMPLES}"
        )


def _told(name: str, kind: str) -> str:
    if name == SAME:
        return "no tensor twice" if kind == "none" else f"{kind} as one tensor"
    return f"{name} as {kind}"


def _of_its_dims(kind: str, traced: frozenset[str]) -> bool:
    """True where tensors of as many dims were traced, of another class of numbers."""
    return any(k.partition(" (")[0] in (kind.partition(" (")[0], TENSOR) for k in traced)


def _switch(value: Any) -> Hashable:
    """Returns a token as `_token` does, where only switches count."""
    kind = value.__class__
    return cast("Hashable", value) if kind is bool or kind is str else kind_of(value) if callable(value) else cast("Hashable", kind)


def _token(value: Any) -> Hashable:
    """Returns a token that is equal for values of one kind (`autotp.trace.forms.kind_of`), and cheap to make for the common ones."""
    kind = value.__class__
    if value is None or kind in _BY_VALUE:
        return kind, cast("Hashable", value)
    if isinstance(value, Tensor):
        return value.dtype, value.dim()
    if kind is float or kind is torch.dtype or kind is torch.device or isinstance(value, Enum):
        return kind, None if kind is float else cast("Hashable", value)
    if isinstance(value, (tuple, list)):
        return kind, tuple([_token(v) for v in value])
    if isinstance(value, dict):
        return kind, tuple([(k, _token(v)) for k, v in value.items()])
    return kind_of(value)


def install_called(model: nn.Module, plan: Plan, undo: Undo) -> None:
    """Have the modules of `plan.inside` check how they are called; journalled in `undo`."""
    # transformers leaves out masks that change nothing, but not while it is traced; and its paths with and without are traced
    own = is_hugging_face(model)
    for path, forms in plan.inside.items():
        module = model.get_submodule(path)
        signature = Signature.of(module.forward)
        of_torch = type(module).__module__.startswith("torch.nn.") and not runs_opened(getattr(type(module), BASE, type(module)))
        if not forms or (own and not signature.kinds) or of_torch:
            continue
        where = f"{path or 'the model'} ({type(module).__qualname__})"
        called = Called(where, signature, forms, only_switches=own)
        check_calls(module, "_autotp_called", called, undo, compiled=False)
