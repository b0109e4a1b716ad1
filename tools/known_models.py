"""Plan well-known models at their published sizes and print what each rank would hold, as Markdown.

    python -m tools.known_models                                  # all of tools/known_models.yaml, tp 2, 4, 8, 16
    python -m tools.known_models --tp 4 --only GPT-2 Phi-4        # some
    python -m tools.known_models --write docs/models.md           # the page of the documentation

Models are built on the meta device at their full depth: no weights, no download. Each model has a process of its own, two at
a time; one that fails, or that needs more than `--timeout` seconds, has the reason in its cells. Seconds a model go to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MODELS = Path(__file__).with_suffix(".yaml")
TP = (2, 4, 8, 16)
#: How far the elements counted may be from the published number of parameters.
TOLERANCE = 0.01
Line = dict[str, Any]

PAGE = """\
# Well-known models

This page shows autotp's plans for {count} models at their published sizes, made on the meta device
without weights. The configs are in `tools/known_models.yaml`. A planned model was not run:
[coverage.md](coverage.md) says which architectures were compared with one device. Written by

    {command}

A cell holds, for that many ranks,

- the share of the model's parameter elements on each rank, padding included (`Plan.local_share`; 1
  ÷ tp is an even share),
- padding over all ranks ÷ the model's elements (`Plan.padding_waste`),
- multiply-adds a token of the busiest rank ÷ an even share of the model's (`Plan.busiest_work`; all
  experts count, tables that are only looked up do not, and a weight that every rank keeps whole
  counts on each).

*heads* are query heads, / key-value heads where there are fewer, × the width of one.

"""


@dataclass(frozen=True, slots=True)
class Cell:
    """A plan over `tp` ranks, or why there is none."""

    share: float = 0.0
    padding: float = 0.0
    work: float = 0.0
    error: str = ""

    def __str__(self) -> str:
        if self.error:
            return f"error: {_short(self.error, 60)}"
        return f"{self.share:.3f}, {self.padding * 100:.1f} %, {self.work:.2f} ×"


@dataclass(slots=True)
class Row:
    """A model: its sizes as text, and a cell for each number of ranks."""

    name: str
    facts: Mapping[str, str] = field(default_factory=dict)
    cells: dict[int, Cell] = field(default_factory=dict)
    seconds: float = 0.0


COLUMNS = ("parameters", "heads", "width", "layers", "vocabulary")


def configs() -> dict[str, dict[str, Any]]:
    """The entries of the data file by name."""
    import yaml

    found: dict[str, dict[str, Any]] = yaml.safe_load(MODELS.read_text(encoding="utf-8"))
    return found


def config_of(entry: Mapping[str, Any]) -> Any:
    """The transformers config of an entry."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[entry["type"]](**{key: value for key, value in entry.items() if key not in ("type", "size")})


def facts(config: Any, elements: int) -> dict[str, str]:
    """The sizes that the table shows; a dash where a model has no such thing."""

    def get(*names: str) -> int | None:
        return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)

    heads, kv, width = get("num_attention_heads", "num_heads"), get("num_key_value_heads"), get("hidden_size", "d_model")
    if config.model_type == "falcon":
        kv = config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else heads
    per_head = get("v_head_dim", "head_dim", "d_kv") or (width // heads if heads and width else None)
    text = f"{heads}{f'/{kv}' if kv and kv != heads else ''} × {per_head}" if heads else "–"
    layers = [get(a, b) for a, b in (("encoder_layers", "num_hidden_layers"), ("decoder_layers", "num_decoder_layers"))]
    return {
        "parameters": f"{elements / 1e9:.1f} B" if elements >= 999.5e6 else f"{elements / 1e6:.0f} M",
        "heads": text,
        "width": str(width or "–"),
        "layers": " + ".join(str(n) for n in layers if n),
        "vocabulary": str(get("vocab_size") or "–"),
    }


def survey(name: str, tps: Sequence[int]) -> None:
    """Build one model, plan it for each number of ranks, print a line of JSON for each result at once."""
    import autotp
    from autotp import targets

    entry = configs()[name]
    config = config_of(entry)
    model = targets.build(config, device="meta")
    elements = sum(p.numel() for p in model.parameters())
    if abs(elements / (entry["size"] * 1e9) - 1) > TOLERANCE:
        raise ValueError(f"{elements} parameters, published are {entry['size']} billion: the config in {MODELS.name} is wrong")
    _emit({"facts": facts(config, elements)})
    for tp in tps:
        try:
            plan = autotp.plan(model, tp=tp)
            cell = {"share": plan.local_share, "padding": plan.padding_waste, "work": plan.busiest_work}
        except Exception as error:  # the next number of ranks must have its turn whatever this one raises
            cell = {"error": f"{type(error).__name__}: {error}"}
        _emit({"tp": tp, **cell})


def _emit(line: Line) -> None:
    print(json.dumps(line), flush=True)


def row(name: str, tps: Sequence[int], timeout: float) -> Row:
    """`survey` in a process of its own; what it did not get to say becomes an error cell."""
    start = time.perf_counter()
    command = [sys.executable, str(Path(__file__).resolve()), "--survey", name, "--tp", *map(str, tps)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            code = subprocess.run(command, cwd=ROOT, stdout=out, stderr=err, timeout=timeout, check=False).returncode
            missing = ""
        except subprocess.TimeoutExpired:
            code, missing = 0, f"no plan within the {timeout:.0f} s of this model"
        out.seek(0)
        err.seek(0)
        said = [line for line in err.read().splitlines() if line.strip()]
        if code:
            missing = said[-1] if said else f"the process ended with exit code {code}"
        found = [json.loads(line) for line in out.read().splitlines() if line.startswith("{") and line.endswith("}")]
    result = Row(name, seconds=time.perf_counter() - start)
    for line in found:
        if "facts" in line:
            result.facts = line["facts"]
        else:
            tp = line.pop("tp")
            result.cells[tp] = Cell(**line)
    for tp in tps:
        result.cells.setdefault(tp, Cell(error=missing or "the process said nothing"))
    return result


def table(rows: Sequence[Row], tps: Sequence[int]) -> str:
    """The Markdown table, and below it the errors in full."""
    lines = [f"| model | {' | '.join(COLUMNS)} | {' | '.join(f'tp {tp}' for tp in tps)} |", "|---" * (1 + len(COLUMNS) + len(tps)) + "|"]
    errors = []
    for r in rows:
        values = [r.name, *(r.facts.get(column, "–") for column in COLUMNS), *(str(r.cells[tp]) for tp in tps)]
        lines.append(f"| {' | '.join(v.replace('|', '/') for v in values)} |")
        errors += [f"- {r.name}, tp {tp}: {_short(r.cells[tp].error, 600)}" for tp in tps if r.cells[tp].error]
    return "\n".join([*lines, *(["", "Errors:", "", *errors] if errors else []), ""])


def _short(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.known_models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tp", type=int, nargs="+", default=list(TP), help="numbers of ranks")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one model, all numbers of ranks together")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page here instead of printing the table")
    parser.add_argument("--survey", metavar="NAME", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.survey:
        survey(args.survey, args.tp)
        return
    names = args.only or list(configs())
    if unknown := sorted(set(names) - set(configs())):
        parser.error(f"no such model in {MODELS.name}: {', '.join(unknown)}; there are {', '.join(configs())}")
    start, rows = time.perf_counter(), []
    with ThreadPoolExecutor(args.jobs) as pool:
        for number, r in enumerate(pool.map(lambda name: row(name, args.tp, args.timeout), names), 1):
            print(f"{number}/{len(names)} {r.name}: {r.seconds:.0f} s", file=sys.stderr, flush=True)
            rows.append(r)
    print(f"{time.perf_counter() - start:.0f} s in all", file=sys.stderr)
    text = table(rows, args.tp)
    if args.write is None:
        print(text)
        return
    tps = "" if tuple(args.tp) == TP else f" --tp {' '.join(map(str, args.tp))}"
    only = f" --only {' '.join(names)}" if args.only else ""
    command = f"python -m tools.known_models{tps}{only} --write {args.write}"
    args.write.write_text(PAGE.format(count=len(rows), command=command) + text, encoding="utf-8")


if __name__ == "__main__":
    main()
