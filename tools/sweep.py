"""Try autotp on every architecture of transformers, tiny, and say how many come out equal.

    python tools/sweep.py --out sweep.jsonl                    # all of them, two ranks
    python tools/sweep.py --out sweep.jsonl --only llama gpt2  # some
    python tools/sweep.py --plan-only                          # no comparison
    python tools/sweep.py --own-inputs                         # no comparison, and autotp makes the example inputs from the config
    python tools/sweep.py --out sweep.jsonl --summary          # only count what the file holds
    python tools/sweep.py --out sweep.jsonl --docs docs/coverage.md --summary

Each line of the output file is one model type: what was built, how the plan went, and the error of each aspect compared (see
`autotp/testing/equivalence/observe.py`). A type that hangs is ended after `--timeout` seconds and the ranks are replaced. Types
already in the file are skipped unless `--again`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ASPECTS = ("state", "outputs", "gradients", "generation", "training", "steps")
Record = dict[str, Any]


def survey(model_type: str, tp: int, plan_only: bool, stand_in: bool, own_inputs: bool = False) -> Record:
    """One model type on one rank: build, plan, compare."""
    import torch

    from autotp.testing import NotEquivalent
    from autotp.testing.inputs import tiny_inputs
    from autotp.testing.tiny.models import model_class, tiny_config
    from tests.support import pooled, standin
    from tests.support.families import transformer

    record: Record = {"type": model_type, "stage": "config"}
    try:
        config = tiny_config(model_type)
        record["stage"] = "class"
        with torch.device("meta"):
            size = sum(p.numel() for p in model_class(config)(config).parameters())
        if size > 10_000_000:
            raise RuntimeError(f"the tiny model has {size} parameters")
        record["stage"] = "build"
        model = transformer(model_type)
        record["class"], record["parameters"] = type(model).__name__, sum(p.numel() for p in model.parameters())
        record["stage"] = "inputs"
        inputs = None if own_inputs else tiny_inputs(model)
        record["inputs"] = None if inputs is None else sorted(inputs)
        record["stage"] = "plan"
        if not stand_in:
            import autotp

            start = time.perf_counter()
            plan = autotp.plan(model, tp=tp, example_inputs=inputs)
            record["plan_seconds"] = round(time.perf_counter() - start, 3)
            record["plan_share"] = round(float(plan.local_share), 4)
        if plan_only or own_inputs:
            record["stage"] = "done"
            return record
        record["stage"] = "compare"
        options: dict[str, Any] = {"around": standin.replicated} if stand_in else {}
        try:
            found = pooled.compare(partial(transformer, model_type), **options)
        except NotEquivalent as error:
            if error.found is None:
                raise
            found = error.found
    except Exception as error:  # the next type must have its turn whatever this one raises
        record["error"] = f"{type(error).__name__}: {str(error)[:1000]}"
        record["trace"] = traceback.format_exc(limit=-4)[-2000:]
        return record
    record |= {
        "stage": "done",
        "dtype": str(found.dtype).removeprefix("torch."),
        "local_share": round(found.local_share, 4),
        "errors": {name: aspect.error for name, aspect in found.aspects.items()},
        "where": {name: aspect.where for name, aspect in found.aspects.items()},
        "first": found.first,
        "skipped": {name: text[:200] for name, text in found.skipped.items()},
        "failed": sorted(found.failed),
    }
    return record


def merge(records: list[Record]) -> Record:
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


def run(types: list[str], args: argparse.Namespace) -> None:
    """Survey the types, one after the other, writing a line for each."""
    from tests.support.ranks import RankError, Ranks

    ranks = Ranks(1 if args.plan_only or args.own_inputs else args.tp, timeout=args.timeout, grace=3.0)
    with args.out.open("a") as file:
        for number, model_type in enumerate(types, 1):
            start = time.perf_counter()
            try:
                record = merge(ranks.run(survey, model_type, args.tp, args.plan_only, args.stand_in, args.own_inputs))
            except RankError as error:
                record = {"type": model_type, "stage": "ranks", "error": str(error)[-2000:]}
            record["seconds"] = round(time.perf_counter() - start, 2)
            file.write(json.dumps(record) + "\n")
            file.flush()
            print(f"{number}/{len(types)} {line(record)}", flush=True)
    ranks.stop()


def line(record: Record) -> str:
    """One record for people."""
    if "error" in record:
        return f"{record['type']}: {record['stage']}: {' '.join(record['error'].split())[:160]}"
    share = record.get("local_share", record.get("plan_share", 1.0))
    failed = ", ".join(record.get("failed", [])) or "equal"
    return f"{record['type']}: share {share:.3f}, {failed}, {record['seconds']} s"


def load(path: Path) -> dict[str, Record]:
    """The last record of each type."""
    if not path.exists():
        return {}
    return {record["type"]: record for record in map(json.loads, path.read_text().splitlines())}


def is_missing(record: Record) -> bool:
    """A library that is not installed, or a config that transformers ships without a model."""
    text = record.get("error", "")
    return "requires the" in text or "No module named" in text or "no model class takes" in text


def counts(records: Iterable[Record]) -> dict[str, int | float]:
    """The numbers of the summary, in order."""
    records = list(records)
    here = [r for r in records if not is_missing(r)]
    ran = [r for r in here if r["stage"] in ("plan", "compare", "done", "ranks")]
    planned = [r for r in ran if "plan_share" in r]
    compared = [r for r in ran if "errors" in r]
    shares = [r.get("local_share", r.get("plan_share")) for r in (compared or planned)]
    result: dict[str, int | float] = {
        "model types of transformers": len(records),
        "… whose libraries are installed and that are models": len(here),
        "… built tiny and run on one device": len(ran),
        "planned": len(planned),
        "compared": len(compared),
        "equal in everything compared": sum(not r["failed"] for r in compared),
    }
    for aspect in ASPECTS:
        tried = [r for r in compared if aspect in r["errors"]]
        result[f"equal {aspect} (of {len(tried)} that have it)"] = sum(aspect not in r["failed"] for r in tried)
    result["median share of the parameters on a rank"] = round(statistics.median(shares), 4) if shares else 1.0
    result["sharded (share below 0.9)"] = sum(share < 0.9 for share in shares)
    return result


def summary(records: dict[str, Record]) -> str:
    """Counts, then what failed most."""
    lines = [f"{name:60} {value}" for name, value in counts(records.values()).items()]
    picks = _errors(records)
    if picks:
        lines += ["", "most frequent errors:"]
        lines += [f"{count:5} {text[:150]}" for text, count in picks.most_common(25)]
    return "\n".join(lines)


def _errors(records: dict[str, Record]) -> Counter[str]:
    return Counter(f"{r['stage']}: {' '.join(r['error'].split())[:110]}" for r in records.values() if "error" in r and not is_missing(r))


def page(records: dict[str, Record], tp: int) -> str:
    """The coverage page of the documentation."""
    rows = [f"| {name} | {value} |" for name, value in counts(records.values()).items()]
    table = []
    for record in sorted(records.values(), key=lambda r: r["type"]):
        if "errors" in record:
            table.append(f"| {record['type']} | {record['local_share']:.2f} | {', '.join(record['failed']) or 'equal'} |")
        elif record["stage"] in ("plan", "compare", "ranks"):
            table.append(f"| {record['type']} | | {record['stage']}: {' '.join(record['error'].split())[:80].replace('|', '/')} |")
    return "\n".join(
        [
            "# Coverage",
            "",
            f"Every architecture of transformers, built tiny with random weights, on {tp} ranks; written by",
            "`tools/sweep.py`. *Equal* means a relative error of at most 1e-9 in float64 (2e-5 where an operator",
            "has only float32).",
            "",
            "| | |",
            "|---|---|",
            *rows,
            "",
            "| model type | share of the parameters on a rank | result |",
            "|---|---|---|",
            *table,
            "",
        ]
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("sweep.jsonl"), help="one line a model type")
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="these model types")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="every N-th type, from the I-th: to share the work")
    parser.add_argument("--tp", type=int, default=2, help="number of ranks")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one model type")
    parser.add_argument("--plan-only", action="store_true", help="do not compare")
    parser.add_argument("--own-inputs", action="store_true", help="do not compare; plan without example inputs")
    parser.add_argument("--stand-in", action="store_true", help="without autotp: check models and harness")
    parser.add_argument("--again", action="store_true", help="also types that the file holds already")
    parser.add_argument("--summary", action="store_true", help="run nothing, only count")
    parser.add_argument("--docs", type=Path, help="write the coverage page here")
    args = parser.parse_args()
    if not args.summary:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        part, parts = map(int, args.part.split("/"))
        done = {} if args.again else load(args.out)
        run([t for t in (args.only or list(CONFIG_MAPPING.keys()))[part::parts] if t not in done], args)
    records = load(args.out)
    print(summary(records))
    if args.docs:
        args.docs.write_text(page(records, args.tp))


if __name__ == "__main__":
    main()
