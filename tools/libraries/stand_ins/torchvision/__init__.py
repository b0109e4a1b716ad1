"""A torchvision with the names that other libraries import, for installations without the real one; none of them does anything."""

from __future__ import annotations

__version__ = "0"


class Missing:
    """Stands for whatever is not here; it can be a base class or a default argument, and cannot be made."""

    def __init__(self, *args: object, **options: object) -> None:
        raise ImportError(f"{type(self).__name__} of torchvision is not installed")


def named(module: str, name: str) -> type[Missing]:
    """A class for a name of `module`; its own attributes (members of an enum) are their names."""
    if name.startswith("__"):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    members = {member: member.lower() for member in ("NEAREST", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS")}
    return type(name, (Missing,), {"__module__": module, **members})
