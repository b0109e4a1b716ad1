"""Where a difference begins, and what the plan does there."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from autotp.plan.plan import Plan
from autotp.testing.equivalence.module_calls import Record

_MOST_LINES = 20


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
