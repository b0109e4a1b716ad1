"""What `sweep.py` and `third_party.py` share: comparing one model on ranks that wait for work, and records of many in a file of JSON lines.

A record has the name of the model (`type`), the `stage` that it came to, and either its `error` or what was compared.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@contextmanager
def into(record: Record) -> Iterator[None]:
    """Write an error of the block into the record: the next model must have its turn whatever this one raises."""
    try:
        yield
    except Exception as error:
        record["error"] = f"{type(error).__name__}: {str(error)[:1000]}"
        record["trace"] = traceback.format_exc(limit=-4)[-2000:]


def planned(record: Record, model: Any, inputs: Any, tp: int, check: str = "numbers") -> None:
    """Plan the model and note its share, the seconds, and the reasons by which most elements stay whole."""
    import autotp

    record["stage"] = "plan"
    start = time.perf_counter()
    plan = autotp.plan(model, tp=tp, example_inputs=inputs, check=check)
    record["plan_seconds"] = round(time.perf_counter() - start, 3)
    record |= {"local_share": round(float(plan.local_share), 4), "whole": whole(plan)}


def whole(plan: Any, most: int = 4) -> list[tuple[float, str, str]]:
    """Share of the model's elements that stay whole for a reason, the first such parameter, and the reason; the largest shares."""
    elements: Counter[str] = Counter()
    first: dict[str, str] = {}
    for name, parameter in plan.params.items():
        if name not in plan.aliases and parameter.layout.dim is None:
            elements[parameter.reason] += _size(parameter)
            first.setdefault(parameter.reason, name)
    total = sum(_size(p) for n, p in plan.params.items() if n not in plan.aliases)
    return [(round(count / total, 4), first[reason], reason) for reason, count in elements.most_common(most)]


def _size(parameter: Any) -> int:
    count = 1
    for size in parameter.layout.shape:
        count *= size
    return count


def compared(record: Record, factory: Callable[[], Any], inputs: Any = None, **options: Any) -> None:
    """Compare on the ranks of a pool, of which this is one."""
    from autotp.testing import NotEquivalent
    from tests.support import pooled

    record["stage"] = "compare"
    try:
        found = pooled.compare(factory, inputs, **options)
    except NotEquivalent as error:
        if error.found is None:
            raise
        found = error.found
    record |= {
        "stage": "done",
        "dtype": str(found.dtype).removeprefix("torch."),
        "local_share": round(found.local_share, 4),
        "plan_seconds": round(found.planning, 3),
        "whole": whole(found.plan),
        "errors": {name: aspect.error for name, aspect in found.aspects.items()},
        "where": {name: aspect.where for name, aspect in found.aspects.items()},
        "first": found.first,
        "skipped": {name: text[:200] for name, text in found.skipped.items()},
        "failed": sorted(found.failed),
    }


def arguments(about: str | None, out: str, timeout: float) -> argparse.ArgumentParser:
    """The options that both tools have."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(out), help="one line a model")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="these models")
    parser.add_argument("--tp", type=int, default=2, help="number of ranks")
    parser.add_argument("--timeout", type=float, default=timeout, help="seconds for one model")
    parser.add_argument("--plan-only", action="store_true", help="do not compare")
    parser.add_argument("--again", action="store_true", help="also models that the file holds already")
    parser.add_argument("--summary", action="store_true", help="run nothing, only count")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="write the page of the documentation here")
    return parser


def page(title: str, text: Sequence[str], counts: Mapping[str, int | float], head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A page of the documentation: what was tried, the counts, and a row a model."""
    table = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    numbers = [f"| {name} | {value} |" for name, value in counts.items()]
    return "\n".join([f"# {title}", "", *text, "", "| | |", "|---|---|", *numbers, "", table[0], "|---" * len(head) + "|", *table[1:], ""])


def merge(records: Sequence[Record]) -> Record:
    """The worst over the ranks."""
    worst = records[0]
    for other in records[1:]:
        if "error" in other and "error" not in worst:
            worst = other
        for name, error in other.get("errors", {}).items():
            if "errors" in worst and not error <= worst["errors"].get(name, -1.0):
                worst["errors"][name] = error
        worst["failed"] = sorted(set(worst.get("failed", [])) | set(other.get("failed", [])))
    return worst


def run(names: Sequence[str], one: Callable[[str], Record], out: Path, world: int, timeout: float) -> None:
    """Call `one` for each name on `world` ranks, writing a line for each; a name that hangs is ended, and the ranks are replaced."""
    from tests.support.ranks import RankError, Ranks

    ranks = Ranks(world, timeout=timeout, grace=3.0)
    with out.open("a") as file:
        for number, name in enumerate(names, 1):
            start = time.perf_counter()
            try:
                record = merge(ranks.run(one, name))
            except RankError as error:
                record = {"type": name, "stage": "ranks", "error": str(error)[-2000:]}
            record["seconds"] = round(time.perf_counter() - start, 2)
            file.write(json.dumps(record) + "\n")
            file.flush()
            print(f"{number}/{len(names)} {line(record)}", flush=True)
    ranks.stop()


def line(record: Record) -> str:
    """One record for people."""
    if "error" in record:
        return f"{record['type']}: {record['stage']}: {' '.join(record['error'].split())[:160]}"
    return f"{record['type']}: share {share(record):.3f}, {', '.join(record.get('failed', [])) or 'equal'}, {record['seconds']} s"


def share(record: Record) -> float:
    """Elements that the fullest rank holds ÷ elements of the model."""
    return float(record.get("local_share", 1.0))


def load(path: Path) -> dict[str, Record]:
    """The last record of each name."""
    if not path.exists():
        return {}
    return {record["type"]: record for record in map(json.loads, path.read_text().splitlines())}


def summary(counts: Mapping[str, int | float], records: Iterable[Record]) -> str:
    """Counts, then the errors that came most often."""
    lines = [f"{name:60} {value}" for name, value in counts.items()]
    errors = Counter(f"{r['stage']}: {' '.join(r['error'].split())[:110]}" for r in records if "error" in r)
    if errors:
        lines += ["", "most frequent errors:", *(f"{count:5} {text[:150]}" for text, count in errors.most_common(25))]
    return "\n".join(lines)


def reason(record: Record) -> str:
    """The cell that says by which reason most of what stays whole does, without the line of the library's code."""
    why = " ".join(record["whole"][0][2].split()) if record.get("whole") else ""
    return re.sub(r" \([^()]*\.py.*", "", why)[:100].replace("|", "/")


def result(record: Record) -> str:
    """The cell of a table that says how it went."""
    if "error" in record:
        return f"{record['stage']}: {' '.join(record['error'].split())[:80].replace('|', '/')}"
    return ", ".join(f"{name} ({record['errors'][name]:.1e})" for name in record.get("failed", [])) or "equal"
