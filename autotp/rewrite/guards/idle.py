"""Refuses calls of modules that no traced call ran, by code that holds values which are not whole.

One line of code may run other modules in each call: `for layer in self.layers[: x.shape[1]]`, `self.experts[int(task)](x)`. Those that
a traced call ran are cut. The others are whole, but what surrounds them is a rank's part, a summand, or is given a gradient that is a
summand. In code that holds whole values alone they compute as on one device, and run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.utils._pytree import tree_leaves

from autotp.errors import AutoTPError
from autotp.plan.plan import Plan
from autotp.plan.spec import Shown
from autotp.rewrite.modules.classes import check_calls
from autotp.rewrite.running import Running
from autotp.rewrite.running_code import EXAMPLES, HOLDING, Holding, running_code
from autotp.rewrite.undo import Undo
from autotp.trace.reading import is_container

#: Right for summands too.
_PASS_ON = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)
_ON_ELEMENTS = (
    *(nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid, nn.Mish),
    *(nn.ReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold),
)


class Idle:
    """Checks the calls of one module that no traced call ran.

    around: the nearest module around it that one ran. picked: it is in a list, or has tensors: other modules may run in its place.
    """

    __slots__ = ("around", "module", "picked", "running", "where")

    def __init__(self, path: str, module: nn.Module, around: Holding, running: Running, *, listed: bool) -> None:
        self.picked = listed or any(True for _ in (*module.parameters(), *module.buffers()))
        self.where = f"{path} ({type(module).__qualname__})"
        self.module, self.around, self.running = (module,), around, running

    def check(self, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> None:
        """Raise in a call of the model, where the code that calls the module holds what the module may not get.

        Raises:
            AutoTPError: names the module.
        """
        if is_dynamo_compiling() or self.running.inside_compiled:
            code: Holding | None = self.around  # the stack is not that of the code
        elif not self.running.open:
            return
        else:
            code = found[0] if (found := running_code()) is not None else None
        if code is not None and code.shown is not None and self._clashes(code.shown, (args, kwargs)):
            raise AutoTPError(
                f"{self.where} is called, which no traced call of the model did, by {code}: the plan is not made for what it would compute "
                f"there. {EXAMPLES}"
            )

    def _clashes(self, shown: Shown, given: Any) -> bool:
        """True where the module is not right for what code holds.

        A gradient would be a summand in its parameters; or it may pass a whole one on where a summand is expected, as a module does
        that is picked from a list of such ones.
        """
        module = self.module[0]
        if shown is Shown.GRADIENT:
            if not torch.is_grad_enabled():
                return False
            flows = any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(given))
            return any(p.requires_grad for p in module.parameters()) or (flows and self.picked)
        right = _PASS_ON if shown is Shown.SUM else (*_PASS_ON, *_ON_ELEMENTS)
        return not all(isinstance(m, right) for m in module.modules() if type(m) is not nn.Sequential)


def install_idle(model: nn.Module, plan: Plan, running: Running, undo: Undo) -> None:
    """Have the modules that no traced call ran check their calls; journalled in `undo`.

    The others get a mark that says what their code holds. Operators that get a parameter read it, too.
    """
    if not plan.holds:
        return
    around: dict[str, Holding] = {}  # path of each module, the idle ones too → the innermost module there that a traced call ran
    for path, module in model.named_modules():
        owner = path.rpartition(".")[0]
        if path and (path in plan.idle or is_container(module)):
            around[path] = around[owner]
            if not is_container(module):
                listed = is_container(model.get_submodule(owner))
                check_calls(module, "_autotp_idle", Idle(path, module, around[path], running, listed=listed), undo, compiled=True)
        else:
            around[path] = Holding(path, plan.holds.get(path))
            undo.set_item(module.__dict__, HOLDING, around[path])
