"""Takes the rewrite off copies of rewritten modules, which no journal knows.

Code that keeps a trained copy of a module beside it (`modules_to_save` of PEFT) copies what autotp did to the module too. What the
rewrite puts on a module says what was there before.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from autotp.rewrite.attributes import LOCAL, before
from autotp.rewrite.guards.hooks import GuardedHooks, InnerHooks
from autotp.rewrite.modules.classes import BASE, TAKEN_BACK

_OURS = "_autotp"
_FORWARD = "_autotp_forward_0"


def is_rewritten(module: nn.Module) -> bool:
    """True for a module that runs as a part of a parallel model, or that guards one."""
    return hasattr(type(module), BASE) or any(n.startswith(_OURS) and v is not TAKEN_BACK for n, v in module.__dict__.items())


def strip(module: nn.Module) -> None:
    """Make a copy of a rewritten module, without its children, what the original was before; its parameters stay."""
    attributes = module.__dict__
    for head in {a.path.partition(".")[0] for a in attributes.get(LOCAL, ())}:
        attributes[head] = before(module, head, attributes[LOCAL], type(module).__qualname__)
    if _FORWARD in attributes:
        own = attributes[_FORWARD]
        if own is None or own is TAKEN_BACK:
            attributes.pop("forward", None)
        else:
            attributes["forward"] = own
    module.__class__ = getattr(type(module), BASE, type(module))
    for name, value in list(attributes.items()):
        if name.startswith(_OURS):
            del attributes[name]
        elif isinstance(value, (GuardedHooks, InnerHooks)):
            attributes[name] = OrderedDict(value)
