"""Finds the methods and properties that code on parts reaches: one that takes the place of another would run by the plan of the other."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from autotp.rewrite.guards.watchers import Methods
from autotp.trace.reading import Names, Reading, is_container, is_list, methods_outside, outside, own_methods

_DEEPEST = 4  # modules in modules that code calls methods of


def methods_of(cls: type) -> frozenset[str]:
    """Returns the names of the methods and properties that a class has from code in Python."""
    return frozenset().union(*map(own_methods, cls.__mro__))


def code_of(module: nn.Module, reading: Reading) -> tuple[Names, frozenset[str]]:
    """Returns the names in the code of a module, and those that it may reach by names that it computes (`getattr(self, self.kind)`).

    The latter are what its texts name, and the methods of its class beside its forward.
    """
    cls = type(module)
    code = reading.of(cls)
    if not code.computed:
        return code, frozenset()
    texts = frozenset(v for v in module.__dict__.values() if isinstance(v, str))
    reached = frozenset().union(*(own_methods(c) for c in cls.__mro__ if c.__module__ == cls.__module__))
    reached = frozenset(n for n in reached if not n.startswith("__")).difference(vars(nn.Module))
    reached |= texts.intersection((*module.__dict__, *methods_outside(cls)))
    return reading.of_methods(cls, reached | {"forward"}), reached


def below(module: nn.Module, names: frozenset[str], reading: Reading, depth: int = 0) -> Iterator[tuple[str, nn.Module, Names]]:
    """Yields the modules in one that its code reaches by an attribute, and those in lists and dicts of modules there.

    With each the names in the code of those of its methods that `names` are of: it runs as code of the module above.
    """
    for name, child in module._modules.items():
        if child is None:
            continue
        code = reading.of_methods(type(child), names & methods_outside(type(child)) - {"forward"})
        if not is_list(child):
            yield name, child, code
        if is_container(child) or (depth < _DEEPEST and (depth or name in names)):
            inner = names | code.read
            for inside, other, its in below(child, inner, reading, depth + (not is_container(child))):
                if is_container(child) or inside.partition(".")[0] in inner:
                    yield f"{name}.{inside}", other, its


def of_classes(cls: type, names: frozenset[str]) -> Iterator[Methods]:
    """Yields a watcher of those of `names` that are methods of a class, and of those that its bases have: a method may call that of a base.

    Its forward is watched elsewhere.
    """
    found = {c: names & own_methods(c) for c in outside(cls)}
    for c, own in found.items():
        every = own.union(*found.values()) - {"forward"} if c is cls else own
        # What is made anew at each access cannot be compared.
        kept = [n for n in sorted(every) if getattr(c, n, None) == getattr(c, n, None)]
        if kept:
            yield Methods(c, kept)
