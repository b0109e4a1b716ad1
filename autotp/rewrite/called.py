"""Code that computes on parts is called only as it was traced: for another flag it may take a path of which nothing is known."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from autotp.errors import AutoTPError
from autotp.plan.plan import Plan
from autotp.rewrite.classes import check_calls
from autotp.rewrite.undo import Undo
from autotp.trace.forms import TENSOR, Forms, Signature, kind_of, switches
from autotp.trace.inputs_facts import is_hugging_face

_MOST_KNOWN = 256
_BY_VALUE = frozenset((bool, int, str))


class Called:
    """The forms in which one module was traced. `known`: the calls that were looked at and are right.

    `only_switches`: only what switches something on is looked at.
    """

    __slots__ = ("forms", "known", "only_switches", "signature", "token", "where")

    def __init__(self, where: str, signature: Signature, forms: Forms, *, only_switches: bool) -> None:
        self.where, self.signature, self.forms, self.only_switches = where, signature, forms, only_switches
        self.token: Callable[[Any], Hashable] = _switch if only_switches else _token
        self.known: set[Hashable] = set()

    def check(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise where an argument is of a kind that no traced call had.

        Raises:
            AutoTPError: names the argument.
        """
        token = self.token
        call = (tuple([token(v) for v in args]), tuple([(n, token(v)) for n, v in kwargs.items()]))
        if call in self.known:
            return
        for name, kind in self.signature.kinds_of(args, kwargs).items():
            traced = self.forms.get(name, frozenset())
            known = kind in traced or (kind.startswith(TENSOR) and TENSOR in traced)
            if not known and (switches(kind) or not self.only_switches):
                were = f"had {name} as {' or '.join(sorted(traced))}" if traced else f"did not have {name}"
                raise AutoTPError(
                    f"{self.where} is called with {name} as {kind}; the calls that were traced {were}. Its code computes on a rank's part, "
                    "and may take a path that the plan was not made for. Pass example_inputs of such a call to parallelize as well (a list "
                    "of several calls)"
                )
        if len(self.known) < _MOST_KNOWN:
            self.known.add(call)


def _switch(value: Any) -> Hashable:
    """As `_token`, where only switches count."""
    kind = value.__class__
    return cast("Hashable", value) if kind is bool or kind is str else kind_of(value) if callable(value) else cast("Hashable", kind)


def _token(value: Any) -> Hashable:
    """Equal for values of one kind (`autotp.trace.forms.kind_of`), and cheap to make."""
    kind = value.__class__
    if value is None or kind in _BY_VALUE:
        return kind, cast("Hashable", value)
    if isinstance(value, Tensor):
        return value.dtype, value.dim()
    if isinstance(value, (tuple, list)):
        return kind, tuple([_token(v) for v in value])
    if isinstance(value, dict):
        return kind, tuple([(k, _token(v)) for k, v in value.items()])
    return kind_of(value) if callable(value) else cast("Hashable", kind)


def install_called(model: nn.Module, plan: Plan, undo: Undo) -> None:
    """Have the modules of `plan.inside` look at how they are called; journalled in `undo`."""
    # transformers leaves out masks that change nothing, but not while it is traced; and its paths with and without are traced
    own = is_hugging_face(model)
    for path, forms in plan.inside.items():
        module = model.get_submodule(path)
        signature = Signature.of(module.forward)
        any_tensors = not signature.kinds and all(own or TENSOR in kinds for kinds in forms.values())
        if not forms or any_tensors or type(module).__module__.startswith("torch.nn."):
            continue
        where = f"{path or 'the model'} ({type(module).__qualname__})"
        called = Called(where, signature, forms, only_switches=own)
        check_calls(module, "_autotp_called", called, undo)
