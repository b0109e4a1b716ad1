"""Writes advice as a person reads it: the sentence, then a table of at most 80 columns."""

from __future__ import annotations

import textwrap

from autotp.advise.option import Memory, Option, Step
from autotp.advise.spec import AdviceSpec
from autotp.advise.words import amount
from autotp.advise.workload import Serve

_COLUMNS = 80
#: Field of `Memory` → its short name.
PARTS = {
    "weights": "weights",
    "gradients": "grads",
    "optimizer": "optim",
    "activations": "activ",
    "temporary": "temp",
    "cache": "cache",
    "communication": "comm",
}


def render(advice: AdviceSpec) -> str:
    """The sentence, what each option takes and how fast it is, notes."""
    lines = [*textwrap.wrap(advice.sentence, _COLUMNS), "", *textwrap.wrap(title(advice), _COLUMNS), ""]
    lines += [*_table(memory_rows(advice)), "", *_table(speed_rows(advice))]
    for note in advice.notes:
        lines += ["", *textwrap.wrap(f"note: {note}", _COLUMNS, subsequent_indent="  ")]
    return "\n".join(line.rstrip() for line in lines)


def memory_rows(advice: AdviceSpec) -> list[tuple[str, ...]]:
    """The head and the rows of the table of memory."""
    parts = [n for n in PARTS if any(getattr(o.memory, n) for o in advice.options)]
    head = ("GB a GPU", *(PARTS[n] for n in parts), "total", "batch", "most", "fits")
    return [head, *(_memory(o, parts) for o in advice.options)]


def speed_rows(advice: AdviceSpec) -> list[tuple[str, ...]]:
    """The head and the rows of the table of times."""
    head = ("", *(f"{s.name} ms" for s in advice.options[0].steps), advice.unit, "comm", "messages")
    return [head, *(_speed(o) for o in advice.options)]


def title(advice: AdviceSpec) -> str:
    """The model, the machine and the work in one line."""
    m, w = advice.machine, advice.workload
    gpus = f"{m.gpus} × {m.gpu.name} ({m.gpu.memory / 1e9:.0f} GB, {m.link.name}{', eager' if m.eager else ''})"
    if isinstance(w, Serve):
        what = f"serve {w.batch} × {w.prompt} tokens, {w.new_tokens} new, {w.dtype}"
    else:
        what = f"train {w.tokens} tokens a step in sequences of {w.seq}, {w.dtype}, {w.optimizer}, checkpointing {w.checkpointing}"
        what += ", loss parallel" * w.loss_parallel + ", sequence parallel" * w.sequence_parallel
    return f"{advice.model}, {advice.elements / 1e9:.3g} billion parameters, on {gpus}: {what}"


def _memory(o: Option, parts: list[str]) -> tuple[str, ...]:
    m: Memory = o.memory
    batch = f"{o.batch}×{o.passes}" if o.passes > 1 else str(o.batch)
    most = "" if o.largest_batch is None else str(o.largest_batch)
    return (_name(o), *(_gb(getattr(m, n)) for n in parts), _gb(m.total), batch, most, "yes" if o.fits else "no")


def _speed(o: Option) -> tuple[str, ...]:
    last = o.steps[-1]
    return (_name(o), *(f"{amount(s.seconds * 1e3)}" for s in o.steps), amount(o.throughput), f"{o.share:.0%}", _messages(last))


def _messages(step: Step) -> str:
    count, nbytes = step.collectives, float(step.message_bytes)
    if not count:
        return "-"
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            break
        nbytes /= 1000
    return f"{count}, {nbytes:.3g} {unit}"


def _name(o: Option) -> str:
    return str(o).replace(" replicas", "").replace(" replica", "").replace("pipeline of", "stages ×")


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f}" if nbytes >= 1e8 else f"{nbytes / 1e9:.2f}" if nbytes >= 5e6 else "0"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return ["  ".join([r[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(r[1:], widths[1:], strict=True))]) for r in rows]
