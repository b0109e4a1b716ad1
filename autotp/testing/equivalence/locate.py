"""Where a difference begins, and what the plan does there."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from autotp.plan.plan import Plan
from autotp.testing.equivalence.module_calls import Record, first_difference

_MOST_LINES = 20


def first_module(reference: Record, ranks: list[Record], tolerance: float) -> tuple[str, str] | None:
    """(module path, sentence) of the first call whose outputs stand for something else than the reference's; None where all agree."""
    text = first_difference(reference, ranks, tolerance)
    if not text:
        return None
    path = next((p for p in sorted({k[0] for k in reference}, key=len, reverse=True) if p and _begins(text, p)), "")
    return path, text


def _begins(text: str, path: str) -> bool:
    return text.startswith((path + ":", path + " ", path + ","))


def gradient_order(reference: Record, model: nn.Module, wrong: Sequence[str]) -> str:
    """The parameter among `wrong` whose module's call ended last: its gradient is made first."""
    last = {path: at for at, (path, _, _) in enumerate(reference)}
    known = {name for name, _ in model.named_parameters()}
    return max((n for n in wrong if n in known), key=lambda n: last.get(n.rpartition(".")[0], -1), default=wrong[0] if wrong else "")


def surroundings(plan: Plan, path: str) -> str:
    """Layouts and collectives at a module or parameter, or at the nearest module around it of which the plan knows something."""
    from autotp.errors import InputError

    while True:
        try:
            lines = plan.explain(path).splitlines()
            break
        except InputError:
            if not path:
                return "  the plan has nothing there"
            path = path.rpartition(".")[0]
    lines.sort(key=lambda line: 0 if line.startswith("collective at ") else 1)
    if len(lines) > _MOST_LINES:
        lines = [*lines[:_MOST_LINES], f"… {len(lines) - _MOST_LINES} more lines: plan_of(model).explain({path!r})"]
    return "\n".join(f"  {line}" for line in lines)
