"""Records how the code of modules gets at parameters: by which attribute, or as which object that it holds."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from autotp.trace.graph import Access, Value
from autotp.trace.tape import AGAIN, Tape
from autotp.trace.watch import Refused
from autotp.trace.weights import Weights


class Accesses:
    """Records what each module's code does with parameters. `weights`: the ways to get at them, by id."""

    def __init__(self, tape: Tape) -> None:
        self.weights = Weights()
        self.found: dict[tuple[str, int], dict[Access, None]] = {}  # (module, value id of a parameter) → its ways
        self._tape = tape

    def note(self, tensor: Tensor, value: Value) -> None:
        """Notes that the module that runs uses the parameter `value`, which it has as `tensor`.

        Raises:
            Refused: it is the root, in a function that is checkpointed: the model keeps its class, which would see to it.
        """
        module = self._tape.module
        if self._tape.apart is AGAIN and not module and "." not in value.name:
            raise Refused(
                f"the forward reads {value.name} in a function of its own that is checkpointed, and runs again outside of it: put "
                "the parameter and that code into a module inside of the model"
            )
        shown = self.weights.attributes.get(id(tensor))
        access = Access(shown[1], False) if shown is not None else Access(self.weights.objects.get(id(tensor), value.name), True)
        self.found.setdefault((module, value.id), {})[access] = None

    def fakes(self, tree: Any) -> Any:
        """Returns the arguments of a call with fake parameters instead of real ones that the code holds."""
        if isinstance(tree, Tensor):
            found = self.weights.originals.get(id(tree))
            return tree if found is None else found[0][found[1]]
        if type(tree) in (tuple, list):
            return type(tree)(self.fakes(x) if isinstance(x, (Tensor, tuple, list)) else x for x in tree)
        return tree

    def replaced(self, how: str) -> NoReturn:
        """Notes that code gives a tensor other data: where the tensor is a rank's part, or stands for a parameter, they are lost."""
        raise Refused(
            f"the forward of module {self._tape.module or '<root>'!r} puts other data into a tensor ({how}), which would be lost where "
            "that tensor is a rank's part: write into it in place (`with torch.no_grad(): w.copy_(…)`)"
        )
