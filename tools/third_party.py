"""Try autotp on models of other libraries, tiny, and say how many come out equal.

    pip install --no-deps -r tools/third_party.txt                   # beside autotp[dev]
    python tools/third_party.py --out third_party.jsonl              # all of them, two ranks
    python tools/third_party.py --only timm/vit diffusers            # some: models, or all of a library
    python tools/third_party.py --plan-only                          # no comparison
    python tools/third_party.py --summary --docs docs/coverage-third-party.md   # only count what the file holds, and write the page

The models are in `tools/libraries`; a library that is not installed is left out. Compared in float64, at 1e-9: the state dict, outputs
and gradients of all parameters and arguments in eval and in training mode, and a step of AdamW. Each line of the output file is a model:
its share of the parameters on a rank, the seconds of planning, what stays whole and why, and the error of each aspect.
"""

from __future__ import annotations

import inspect
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import survey
from tools.libraries import LIBRARIES, build, table
from tools.survey import Record


def one(name: str, tp: int, plan_only: bool) -> Record:
    """One model on one rank: build, run, plan, compare."""
    import torch

    from autotp.testing.equivalence.observe import adamw

    record: Record = {"type": name, "stage": "build"}
    with survey.into(record):
        model, call = build(name)
        model.eval()
        record["class"], record["parameters"] = type(model).__name__, sum(p.numel() for p in model.parameters())
        record["stage"] = "run"
        with torch.no_grad():
            model(**call) if isinstance(call, dict) else model(*call)
        if plan_only:
            survey.planned(record, model, named(model, call), tp, "graph")
            record["stage"] = "done"
        else:
            survey.compared(record, partial(_model, name), call, optimizer=adamw)
    return record


def named(model: Any, call: tuple[Any, ...] | dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names of `forward`."""
    return call if isinstance(call, dict) else dict(zip(inspect.signature(model.forward).parameters, call, strict=False))


def _model(name: str) -> Any:
    return build(name)[0]


def chosen(only: Sequence[str]) -> tuple[list[str], list[str]]:
    """The models to try, of the libraries that are here, and the libraries that are not."""
    names: list[str] = []
    missing: list[str] = []
    for library in LIBRARIES:
        if only and not any(name.split("/")[0] == library for name in only):
            continue
        models = table(library)
        if models is None:
            missing.append(library)
        else:
            names += [f"{library}/{model}" for model in models]
    return [n for n in names if not only or n in only or n.split("/")[0] in only], missing


def counts(records: Iterable[Record]) -> dict[str, int | float]:
    """The numbers of the summary, in order."""
    records = list(records)
    ran = [r for r in records if r["stage"] not in ("build", "run")]
    done = [r for r in ran if "errors" in r]
    shares = [survey.share(r) for r in ran]
    return {
        "models": len(records),
        "… of libraries": len({r["type"].split("/")[0] for r in records}),
        "… that run on one device": len(ran),
        "planned": sum("local_share" in r for r in ran),
        "compared": len(done),
        "equal in everything compared": sum(not r["failed"] for r in done),
        "median share of the parameters on a rank": round(statistics.median(shares), 4) if shares else 1.0,
        "share below 0.55": sum(s < 0.55 for s in shares),
        "share of at least 0.9": sum(s >= 0.9 for s in shares),
        "median seconds of planning": round(statistics.median([r["plan_seconds"] for r in ran if "plan_seconds" in r] or [0.0]), 2),
    }


def page(records: dict[str, Record], tp: int) -> str:
    """The page of the documentation."""
    text = (
        f"Models of other libraries than transformers, built tiny with random weights, on {tp} ranks. They",
        "were tried by `tools/third_party.py`, at the versions of `tools/third_party.txt`. *Equal* means a",
        "relative error of at most 1e-9 in float64 in outputs and gradients, in eval mode and, where the",
        "model has no dropout, in training mode, and after a step. The reason is the one by which most of",
        "what stays whole does.",
    )
    rows = []
    for name, record in sorted(records.items()):
        share = f"{survey.share(record):.2f}" if "local_share" in record else ""
        rows.append((name, share, survey.result(record), survey.reason(record)))
    head = ("model", "share of the parameters on a rank", "result", "most that is whole, because")
    return survey.page("Coverage of other libraries", text, counts(records.values()), head, rows)


def main() -> None:
    """Command line."""
    parser = survey.arguments(__doc__, "third_party.jsonl", 120.0)
    args = parser.parse_args()
    if not args.summary:
        names, missing = chosen(args.only)
        known = {*names, *(n.split("/")[0] for n in names)}
        if unknown := [n for n in args.only if n not in known]:
            parser.error(f"{', '.join(unknown)}: no such model, or its library is not installed ({', '.join(missing) or 'all are'})")
        done = {} if args.again else survey.load(args.out)
        work = partial(one, tp=args.tp, plan_only=args.plan_only)
        survey.run([n for n in names if n not in done], work, args.out, 1 if args.plan_only else args.tp, args.timeout)
        print(f"libraries that are not installed: {', '.join(missing) or 'none'}")
    records = survey.load(args.out)
    print(survey.summary(counts(records.values()), records.values()))
    if args.docs:
        args.docs.write_text(page(records, args.tp))


if __name__ == "__main__":
    main()
