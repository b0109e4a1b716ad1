"""Write the plans of a few architectures as YAML files that people read.

    python tools/export_recipes.py            # writes recipes/*.yaml
    python tools/export_recipes.py --check    # writes nothing, exits 1 where a file is not what it would write

Each file is `autotp.plan` of the default config of a transformers class, with two layers, on the meta device: no weights, no
process group. A number in a parameter's name is written `*`; parameters that differ in nothing else share one entry.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import autotp  # noqa: E402  # found through the path set above
from autotp.plan.layout import factors  # noqa: E402
from autotp.plan.model import ParamPlan  # noqa: E402

TP = 2
LAYERS = 2
#: file name → (config class of transformers, its keyword for the number of layers)
RECIPES = {"llama": ("LlamaConfig", "num_hidden_layers"), "gpt2": ("GPT2Config", "n_layer")}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")

HEADER = """\
# {model} over {tp} ranks, as autotp plans it. Written by `python tools/export_recipes.py`; do not edit.
# Made from transformers' default {config} with {layers} layers, on the meta device.
#
# layout   the factors of each dim, major to minor; (a | b) is a concatenation; * is cut evenly over the ranks
# sizes    the sizes of the factors that the layout names
# sharded  the dim that is cut, the factor that is cut in it, and the pattern of its axis
# whole    why a parameter is the same on every rank
# A * in the name of a parameter stands for any number.
"""


def folded(items: Mapping[str, Any]) -> dict[str, Any]:
    """`items` with numbers in the names as `*`.

    Raises:
        ValueError: two names that fold to one have different values.
    """
    out: dict[str, Any] = {}
    for name, value in items.items():
        key = _NUMBER.sub("*", name)
        if out.setdefault(key, value) != value:
            raise ValueError(f"{name} is {value}, and others of {key} are {out[key]}")
    return out


def entry(param: ParamPlan) -> dict[str, Any]:
    """What the file says of one parameter."""
    layout = param.layout
    found = {f.name: f.size for expr in layout.dims for f in factors(expr)}
    out: dict[str, Any] = {"shape": list(layout.shape), "layout": str(layout), "sizes": found}
    if layout.dim is None:
        return {**out, "whole": _NUMBER.sub("*", param.reason)}
    cut = ", ".join(dict.fromkeys(f.name for f in factors(layout.dims[layout.dim]) if f.sharded))
    return {**out, "sharded": {"dim": layout.dim, "factor": cut, "pattern": param.axis}}


def flow(value: Any) -> str:
    """A YAML value on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {flow(item)}" for key, item in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)


def text(name: str) -> str:
    """The file of one architecture."""
    import transformers

    config, layers = RECIPES[name]
    plan = autotp.plan(getattr(transformers, config)(**{layers: LAYERS}), tp=TP)
    lines = [HEADER.format(model=plan.model, tp=TP, config=config, layers=LAYERS), f"model: {plan.model}", f"tp: {TP}", "parameters:"]
    for key, values in folded({n: entry(p) for n, p in plan.params.items() if n not in plan.aliases}).items():
        lines.append(f"  {json.dumps(key)}:")
        lines += [f"    {field}: {flow(value)}" for field, value in values.items()]
    if plan.aliases:
        lines.append("tied:")
        lines += [f"  {json.dumps(a)}: {json.dumps(b)}" for a, b in folded(plan.aliases).items()]
    if plan.attributes:
        lines.append("attributes made local:")
        lines += [f"  {json.dumps(n)}: {flow({'value': a, 'local': b})}" for n, (a, b) in folded(plan.attributes).items()]
    if plan.notes:
        lines += ["notes:", *(f"  - {json.dumps(note, ensure_ascii=False)}" for note in plan.notes)]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args()
    stale = 0
    for name in RECIPES:
        file, wanted = ROOT / "recipes" / f"{name}.yaml", text(name)
        if file.exists() and file.read_text(encoding="utf-8") == wanted:
            continue
        stale += 1
        print(f"{file.relative_to(ROOT)} is {'not what it would be' if args.check else 'written'}")
        if not args.check:
            file.write_text(wanted, encoding="utf-8")
    return int(args.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
