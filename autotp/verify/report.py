"""Holds the findings of a verification as a value."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison over all ranks: `error` is the largest relative error, `detail` says over what, or why it was skipped."""

    name: str
    passed: bool
    detail: str
    error: float | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """The result of `verify`.

    `shrunk` says how the model that was run differs from the target ("" where it does not). `first_difference` names the first
    module, in the order of the forward pass, whose output differs. `failure` is the traceback of a rank that raised.
    `local_share`: parameter elements on each rank over those of the model that was run, padding included; None where no rank
    got that far.
    """

    target: str
    model: str
    tp: int
    parameters: int
    checks: tuple[Check, ...]
    dtype: str = "float64"
    shrunk: str = ""
    first_difference: str = ""
    failure: str = ""
    seconds: float = 0.0
    local_share: float | None = None

    @property
    def passed(self) -> bool:
        """No rank failed and every check passed."""
        return not self.failure and bool(self.checks) and all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"passed": self.passed, **asdict(self)}

    def __str__(self) -> str:
        lines = [f"{self.target}: {self.model}, {self.parameters:,} parameters, tp {self.tp}, {self.dtype}, random weights"]
        if self.dtype != "float64":
            lines.append("  float32: the model does not run in float64, so small errors may hide in rounding")
        if self.shrunk:
            lines.append(f"  shrunk: {self.shrunk}")
        if self.local_share is not None:
            lines.append(f"  {self.local_share:.3f} of the parameter elements on each rank")
        width = max((len(check.name) for check in self.checks), default=0)
        for check in self.checks:
            error = "" if check.error is None else f"  relative error {check.error:.1e}"
            lines.append(f"  {'ok  ' if check.passed else 'FAIL'}  {check.name:<{width}}{error}  {check.detail}")
        if self.first_difference:
            lines.append(f"  first difference: {self.first_difference}")
        if self.failure:
            lines += ["  a rank failed:", *("    " + line for line in self.failure.rstrip().splitlines())]
        lines.append(f"{'passed' if self.passed else 'FAILED'} in {self.seconds:.0f} s")
        return "\n".join(lines)
