"""Records as nodes what a forward does with gradients: calls of autograd functions (APPLY, and a `Scope` around what they run),
hooks (HOOK).
"""

from __future__ import annotations

from collections import OrderedDict
from types import FrameType
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from autotp.trace.functions import Applied, TensorLike, prove
from autotp.trace.graph import Pseudo, Scope
from autotp.trace.questions import Questions
from autotp.trace.tape import Tape
from autotp.trace.values import Values
from autotp.trace.watch import GRAD_FN, REQUIRES_GRAD, Question, Refused, is_model

_AFTER = Tensor.register_post_accumulate_grad_hook
#: Functions of tensors, and getters, that ask about gradients or hang a hook on them.
ABOUT_GRADIENTS = frozenset((REQUIRES_GRAD, GRAD_FN, Tensor.is_inference, Tensor.register_hook, Tensor.retain_grad, _AFTER))


class Gradients:
    """Records what a forward does with gradients: see the module."""

    def __init__(self, tape: Tape, values: Values, questions: Questions) -> None:
        self._tape, self._values, self._questions = tape, values, questions
        self._applied: list[Applied] = []

    def apply(self, frame: FrameType, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Opens a scope where `frame` applies the autograd function `function`: nodes recorded until it returns are in it."""
        caller = frame.f_back
        if self._tape.quiet or caller is None or self._tape.hidden(caller.f_code.co_filename):
            return
        values = tuple(self._values.of(a) for a in args if isinstance(a, Tensor))
        self._tape.scoped(frame, len(self._applied))
        self._applied.append(Applied(function, tuple(self._like(a) if isinstance(a, Tensor) else a for a in args), kwargs))
        self._tape.add(Pseudo.APPLY, values, {}, ())

    def _like(self, tensor: Tensor) -> TensorLike:
        value = self._values.of(tensor)
        return TensorLike(value.shape, value.dtype, self._values.concrete.get(value.id))

    def proven(self) -> tuple[Scope, ...]:
        """Returns the properties that a run of each applied function shows; one run for calls alike."""
        known: dict[object, Scope] = {}
        scopes: list[Scope] = []
        for call in self._applied:
            key = call.function, tuple(a if isinstance(a, (TensorLike, int, float, str, bool, type(None))) else id(a) for a in call.args)
            if key not in known:
                known[key] = prove(call)
            scopes.append(known[key])
        return tuple(scopes)

    def answer(self, func: Any, file: str, args: Any, kwargs: Any) -> Any:
        """Returns the result of one of `ABOUT_GRADIENTS`, called in `file`: questions are noted, hooks recorded.

        Raises:
            Refused: a hook on a parameter that is called when its gradient is complete, as the parameter is not there.
        """
        if self._tape.quiet or self._tape.hidden(file) or not is_model(file):
            return func(*args, **kwargs)
        if func == REQUIRES_GRAD:
            self._questions.ask(Question.GRAD, file)
        elif func is Tensor.is_inference:
            self._questions.ask(Question.INFERENCE, file)
            return self._questions.inference or func(*args, **kwargs)
        elif func is _AFTER:
            where = self._tape.module or "<root>"
            raise Refused(
                f"the forward of module {where!r} calls {func.__name__}, but reads a parameter in the form of a local tensor there"
            )
        else:
            if func == GRAD_FN:
                self._questions.ask(Question.GRAD, file)
            if REQUIRES_GRAD(args[0]):
                self._hooked(args[0])
                if func is Tensor.register_hook:
                    return RemovableHandle(OrderedDict())  # nothing runs backwards here
        return func(*args, **kwargs)

    def _hooked(self, tensor: Tensor) -> None:
        """Notes that code of the model gets the gradient of `tensor`."""
        if not self._tape.quiet:
            self._tape.add(Pseudo.HOOK, (self._values.of(tensor),), {}, ())
