"""Takes one of the options, and says why."""

from __future__ import annotations

from collections.abc import Sequence

from autotp.advise.machine import Machine
from autotp.advise.option import Kind, Option
from autotp.advise.words import amount, gigabytes

#: A simpler option is taken where another one is faster by less than this.
_NOT_WORTH_IT = 0.03


def advised(options: Sequence[Option], machine: Machine, unit: str) -> tuple[Option | None, str]:
    """Returns the option to take and the sentence that says why. The fastest of those that fit is taken, or a simpler one as fast."""
    fitting = [o for o in options if o.fits]
    if not fitting:
        return None, _nothing_fits(options, machine)
    fastest = max(o.throughput for o in fitting)
    best = min((o for o in fitting if o.throughput >= fastest * (1 - _NOT_WORTH_IT)), key=_effort)
    return best, f"{_head(best)}: {'; '.join(_reasons(best, options, machine, unit))}."


def _effort(o: Option) -> tuple[int, int]:
    """Simpler ones first: replicas, then FSDP, then tensor parallelism over few GPUs, a pipeline last."""
    return (o.kind is Kind.PIPELINE, o.tp + (o.kind is Kind.FSDP))


def _head(o: Option) -> str:
    if o.kind is Kind.PIPELINE:
        return f"Use a pipeline of {o.groups} stages"
    if o.kind is Kind.FSDP:
        return f"Use FSDP over {o.groups} GPUs, without tp" if o.tp == 1 else f"Use tp={o.tp}, with FSDP over {o.groups} groups"
    if o.tp == 1:
        return "Use one GPU" if o.groups == 1 else f"Use {o.groups} replicas, without tp"
    return f"Use tp={o.tp}" if o.groups == 1 else f"Use tp={o.tp}, with {o.groups} replicas"


def _reasons(best: Option, options: Sequence[Option], machine: Machine, unit: str) -> list[str]:
    found = [f"{amount(best.throughput)} {unit}" + (f", {best.share:.0%} of the time in communication" if best.share else "")]
    simpler = [o for o in options if not o.fits and _effort(o) < _effort(best)]
    if simpler:
        o = max(simpler, key=_effort)
        found.append(f"{o} does not fit, it takes {gigabytes(o.memory.total)} of {gigabytes(machine.room)} a GPU")
    others = [o for o in options if o.fits and o is not best and o.kind is not Kind.PIPELINE]
    if others:
        o = max(others, key=lambda o: o.throughput)
        why = f", within {_NOT_WORTH_IT:.0%}, and is less simple" if o.throughput > best.throughput else ""
        found.append(f"{o} gives {amount(o.throughput)}" + (f" with {o.share:.0%} in communication" if o.share else "") + why)
    return found


def _nothing_fits(options: Sequence[Option], machine: Machine) -> str:
    least = min(options, key=lambda o: o.memory.total)
    takes = f"{least} takes least, {gigabytes(least.memory.total)} of {gigabytes(machine.room)} a GPU"
    return (
        f"Nothing fits on {machine.gpus} × {machine.gpu.name}: {takes}. "
        "Take more GPUs (FSDP or a pipeline over them), --checkpointing full or --loss-parallel to train, fewer tokens at a time, or a "
        "smaller dtype."
    )
