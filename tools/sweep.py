"""Try autotp on every architecture of transformers, tiny, and say how many come out equal.

    python tools/sweep.py --out sweep.jsonl                    # all of them, two ranks
    python tools/sweep.py --out sweep.jsonl --only llama gpt2  # some
    python tools/sweep.py --plan-only                          # no comparison
    python tools/sweep.py --own-inputs                         # no comparison, and autotp makes the example inputs from the config
    python tools/sweep.py --own-change --only canary           # how far one device moves its results by a change in the last place
    python tools/sweep.py --out sweep.jsonl --summary          # only count what the file holds
    python tools/sweep.py --out sweep.jsonl --docs docs/coverage.md --summary

Each line of the output file is one model type: what was built, how the plan went, and the error of each aspect compared (see
`autotp/testing/equivalence/observe.py`). A type that hangs is ended after `--timeout` seconds and the ranks are replaced. Types
already in the file are skipped unless `--again`.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import survey
from tools.survey import Record

ASPECTS = ("state", "outputs", "gradients", "generation", "training", "steps")


def one(model_type: str, tp: int, plan_only: bool, stand_in: bool, own_inputs: bool) -> Record:
    """One model type on one rank: build, plan, compare."""
    import torch

    from autotp.testing.inputs import tiny_inputs
    from autotp.testing.tiny.models import model_class, tiny_config
    from tests.support import standin
    from tests.support.families import transformer

    record: Record = {"type": model_type, "stage": "config"}
    with survey.into(record):
        config = tiny_config(model_type)
        record["stage"] = "class"
        with torch.device("meta"):
            size = sum(p.numel() for p in model_class(config)(config).parameters())
        if size > 40_000_000:
            raise RuntimeError(f"the tiny model has {size} parameters")
        record["stage"] = "build"
        model = transformer(model_type)
        record["class"], record["parameters"] = type(model).__name__, sum(p.numel() for p in model.parameters())
        record["stage"] = "inputs"
        inputs = None if own_inputs else tiny_inputs(model)
        record["inputs"] = None if inputs is None else sorted(inputs)
        if plan_only or own_inputs:
            survey.planned(record, model, inputs, tp)
            record["stage"] = "done"
        else:
            options: dict[str, Any] = {"around": standin.replicated} if stand_in else {"certificate": "numbers"}
            survey.compared(record, partial(transformer, model_type), **options)
    return record


def own_change(model_type: str) -> str:
    """How far one device moves its own results where each weight is changed in its last place, or not."""
    import torch

    from autotp.testing.equivalence.compare import compare
    from autotp.testing.equivalence.observe import ASPECTS, Training, adamw, observe_model
    from autotp.testing.equivalence.subject import make_subject, twin
    from tests.support.families import transformer

    subject = make_subject(partial(transformer, model_type), None, torch.float64, 0)
    changed = twin(subject.model)
    with torch.no_grad():
        for p in changed.parameters():
            p.mul_(1 + torch.finfo(torch.float64).eps * torch.randint(-1, 2, p.shape, dtype=torch.float64))
    before, after = (observe_model(replace(subject, model=m), Training(1, adamw)).found for m in (subject.model, changed))
    found = (compare(n, before[n], after[n], subject.precision, 0.01) for n in ASPECTS[1:] if n in before and n in after)
    return f"{model_type}: " + ", ".join(f"{a.name} {a.error:.1e} ({a.where})" for a in found)


def is_missing(record: Record) -> bool:
    """A library that is not installed, or a config that transformers ships without a model."""
    text = record.get("error", "")
    return "requires the" in text or "No module named" in text or "no model class takes" in text


def counts(records: Iterable[Record]) -> dict[str, int | float]:
    """The numbers of the summary, in order."""
    records = list(records)
    here = [r for r in records if not is_missing(r)]
    ran = [r for r in here if r["stage"] in ("plan", "compare", "done", "ranks")]
    planned = [r for r in ran if "plan_seconds" in r]
    compared = [r for r in ran if "errors" in r]
    shares = [survey.share(r) for r in (compared or planned)]
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
    result["share of at most 0.55"] = sum(share <= 0.55 for share in shares)
    result["share of at least 0.9"] = sum(share >= 0.9 for share in shares)
    seconds = [r["plan_seconds"] for r in planned]
    result["CPU seconds of planning: median"] = round(statistics.median(seconds), 1) if seconds else 0.0
    result["planned within 3 CPU seconds"] = sum(s <= 3 for s in seconds)
    return result


def page(records: dict[str, Record], tp: int) -> str:
    """The coverage page of the documentation."""
    text = (
        f"Architectures of transformers, built tiny with random weights, on {tp} ranks, without example inputs",
        "and with the check of numbers, as users call it; written by `tools/sweep.py`. *Equal* means a",
        "relative error of at most 1e-9 in float64 (2e-5 where an operator has only float32). The reason is",
        "the one by which most of what stays whole does. What was not tried is listed at the end.",
    )
    tried = [r for _, r in sorted(records.items()) if "errors" in r or r["stage"] in ("plan", "compare", "ranks")]
    rows = [
        (
            r["type"],
            f"{r['local_share']:.2f}" if "local_share" in r else "",
            f"{r['plan_seconds']:.1f}" if "plan_seconds" in r else "",
            survey.result(r),
            survey.reason(r),
        )
        for r in tried
    ]
    head = ("model type", "share of the parameters on a rank", "CPU seconds of planning", "result", "most that is whole, because")
    left = [f"| {n} | {survey.result(r)} |" for n, r in sorted(records.items()) if r not in tried and not is_missing(r)]
    end = ["", "## Not tried", "", "| model type | how far it came |", "|---|---|", *left, ""]
    return survey.page("Coverage", text, counts(records.values()), head, rows) + "\n".join(end)


def main() -> None:
    """Command line."""
    parser = survey.arguments(__doc__, "sweep.jsonl", 60.0)
    parser.add_argument("--part", default="0/1", metavar="I/N", help="every N-th type, from the I-th: to share the work")
    parser.add_argument("--own-inputs", action="store_true", help="do not compare; plan without example inputs")
    parser.add_argument("--own-change", action="store_true", help="nothing but this: one device, weights changed in the last place")
    parser.add_argument("--stand-in", action="store_true", help="without autotp: check models and harness")
    args = parser.parse_args()
    if args.own_change:
        print(*map(own_change, args.only), sep="\n")
        return
    if not args.summary:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        part, parts = map(int, args.part.split("/"))
        done = {} if args.again else survey.load(args.out)
        names = [t for t in (args.only or list(CONFIG_MAPPING.keys()))[part::parts] if t not in done]
        work = partial(one, tp=args.tp, plan_only=args.plan_only, stand_in=args.stand_in, own_inputs=args.own_inputs)
        survey.run(names, work, args.out, 1 if args.plan_only or args.own_inputs else args.tp, args.timeout)
    records = survey.load(args.out)
    print(survey.summary(counts(records.values()), (r for r in records.values() if not is_missing(r))))
    if args.docs:
        args.docs.write_text(page(records, args.tp))


if __name__ == "__main__":
    main()
