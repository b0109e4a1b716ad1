"""Records calls as operators that are not decomposed yet: the ATen half of a recorder, a dispatch mode on the PreDispatch key.

`linear` and `scaled_dot_product_attention` are whole there. An operator that has no rule is recorded in its parts instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._functorch.autograd_function import custom_function_call
from torch._subclasses.schema_check_mode import SchemaCheckMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from autotp.trace.accesses import Accesses
from autotp.trace.batched import Batches
from autotp.trace.graph import Origin, Pseudo, Random
from autotp.trace.ints import IntExpr, Life
from autotp.trace.lengths import BY_LENGTH, with_tensors
from autotp.trace.provenance import gather
from autotp.trace.tape import Caller, Tape
from autotp.trace.unknown_data import Unfolded, UnknownData
from autotp.trace.values import Values, small
from autotp.trace.watch import FUNCTION

_VIEW, _ALIAS, _STRIDED = torch.ops.aten.view.default, torch.ops.aten.alias.default, torch.ops.aten.as_strided_.default


class AtenMode(SchemaCheckMode):  # type: ignore[no-untyped-call]
    """Records ATen calls. torch lets only a few classes of modes onto the PreDispatch key; SchemaCheckMode's slot is the plain one."""

    def __init__(self, keep: Callable[[Any], bool], tape: Tape, values: Values, accesses: Accesses, data: UnknownData, life: Life) -> None:
        """`keep`: operators recorded whole. `life`: of the tags of this trace."""
        TorchDispatchMode.__init__(self, _dispatch_key=DispatchKey.PreDispatch)  # type: ignore[no-untyped-call]
        self.keep, self.tape, self.values, self.accesses, self.data, self.life = keep, tape, values, accesses, data, life
        self.batches = Batches(tape, values)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # plans are made without dynamo, whose wrapper would be around each operator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._recorded(func, args, kwargs or {})

    def _recorded(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run and record one ATen call."""
        if torch._C._are_functorch_transforms_active():
            self._escape((args, kwargs), func._schema.is_mutable)
            return func(*args, **kwargs)
        tape, values = self.tape, self.values
        place = tape.caller.place if tape.caller else None
        if tape.quiet or (place is not None and tape.hidden(place.file)) or (func is _STRIDED and _is_as_it_was(args, tape.caller)):
            return func(*args, **kwargs)
        if func._schema.name == "aten::set_" and values.of(args[0]).origin in (Origin.PARAM, Origin.BUFFER):
            self.accesses.replaced("`set_`")
        whole = self.keep(func) or func._schema.name in BY_LENGTH
        if not whole and (parts := self._decomposed(func, args, kwargs)) is not NotImplemented:
            return parts
        vargs, vkwargs = self._values_for(args), {name: self._values_for(x) for name, x in kwargs.items()}
        try:
            result, real = self.data.run(func, args, kwargs)
        except Unfolded:
            if (parts := self._decomposed(func, args, kwargs)) is not NotImplemented:
                return parts
            raise RuntimeError(f"what {func._schema.name} gives depends on data that is not known without running the model") from None
        if not isinstance(result, (Tensor, tuple, list)):
            tape.add(func, vargs, vkwargs, (), **self._provenance())  # a number leaves the graph
            return result
        written = [(i, a.name) for i, a in enumerate(func._schema.arguments) if a.alias_info and a.alias_info.is_write]
        mutated = [args[i] if i < len(args) else kwargs.get(name) for i, name in written]
        outputs = []
        flat = [result] if isinstance(result, Tensor) else [t for t in result if isinstance(t, Tensor)]
        reals = [real] if isinstance(result, Tensor) else real if real is not None else [None] * len(flat)
        for tensor, exact in zip(flat, reals, strict=False):
            value = values.made(tensor, bool(written))
            outputs.append(value)
            if exact is not None and small(exact):
                (values.drawn if self.data.drawn else values.concrete)[value.id] = exact
        if func is _VIEW and place is not None and place.file == FUNCTION:  # what a function returns as it is, in a view of its size
            func, vargs = _ALIAS, vargs[:1]
        node = tape.add(func, vargs, vkwargs, tuple(outputs), **self._provenance())
        values.note_fill(node)
        for target in mutated:
            if isinstance(target, Tensor):
                new = outputs[0] if outputs else values.of(target)
                for before, after in values.written(target, new):
                    tape.add(Pseudo.WRITE, (before, new), {}, (after,))
        return result

    def _decomposed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the result of the operators that `func` is made of, which are recorded; `NotImplemented` where it is not made of
        others.
        """
        if not func._can_decompose():
            return NotImplemented
        func, args = with_tensors(func, args)
        with self:
            return func.decompose(*args, **kwargs)

    def _values_for(self, tree: Any) -> Any:
        """Returns the arguments of an ATen call with values in the place of tensors, which come alone or in lists; generators as
        they are now.
        """
        if isinstance(tree, Tensor):
            return self.values.of(tree)
        if isinstance(tree, torch.Generator):
            return Random.of(tree)
        return type(tree)(map(self._values_for, tree)) if type(tree) in (tuple, list) else tree

    def _escape(self, args: tuple[Any, ...], written: bool) -> None:
        """Note which values are used inside a functorch transform, whose tensors are wrappers that cannot be told apart."""
        if self.tape.quiet:
            return
        functorch = torch._C._functorch
        for tensor in (a for a in tree_flatten(args)[0] if isinstance(a, Tensor)):
            while functorch.is_functorch_wrapped_tensor(tensor):
                tensor = functorch.get_unwrapped(tensor)
            value = self.values.known(tensor)
            if value is None:
                continue
            if value.dtype.is_floating_point and value.origin is not Origin.CONST:
                self.batches.take(value, written)
            self.tape.add(Pseudo.ESCAPE, (value,), {}, ())

    def _provenance(self) -> dict[str, Any]:
        caller = self.tape.caller
        if caller is None:
            return {}
        ints: list[IntExpr] = []
        tensors: list[int] = []
        gather(caller.args, ints, tensors, self.values, self.life)
        gather(tuple(caller.kwargs.values()), ints, tensors, self.values, self.life)
        return {"place": caller.place, "ints": tuple(ints), "tensors": tuple(tensors), "call": self.tape.number}


def _is_as_it_was(args: tuple[Any, ...], caller: Caller | None) -> bool:
    """True for an `as_strided_` by which torch itself gives a result the strides of another memory format: no element is another one.

    A pool to one place does so.
    """
    if len(args) != 3 or caller is None:
        return False
    if any(list(args[1]) == list(a) for a in (*caller.args, *caller.kwargs.values()) if isinstance(a, (list, tuple))):
        return False  # the code says them
    x, size, stride = args
    return tuple(size) == x.shape and all(n == 1 or a == b for n, a, b in zip(size, stride, x.stride(), strict=True))


@custom_function_call.py_impl(AtenMode)
def _custom_function(mode: AtenMode, function: Any, *args: Any, **kwargs: Any) -> Any:
    """An autograd.Function inside vmap (transformers' masks index with one): run by functorch, not recorded."""
    return custom_function_call(function, *args, **kwargs)
