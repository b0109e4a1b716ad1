"""Mutation control of every model in the tests: `python tools/mutants.py` prints how many mistakes of each kind are caught.

Each model is parallelized, then once for each mistake that its plan could have (`autotp.testing.sabotage`), and `assert_equivalent`
must notice every one. A mistake that survives is printed under the table, and the exit code is 1. `HARMLESS` lists, with the
reason, the few changes that were looked into and are none.

    python tools/mutants.py --tp 2 --only llama gpt2 per_head
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import nn

from autotp.errors import InputError
from autotp.testing.sabotage import Kind, Survey, survey
from tests.models.custom import CUSTOM
from tests.models.geometry import batch, decoder
from tests.support.families import transformer
from tests.test_geometry import NAMED
from tests.test_transformers import FAMILIES, MIXTURES

#: Changes that are no mistakes: (model, mutation) → why the answer is the same.
_BROADCAST = (
    "local query heads over global key heads give a group of 1: the one local key head is not repeated, and the product broadcasts it"
)
HARMLESS = {(f"geometry_{n}", "forget attribute kv of blocks.0.attention"): _BROADCAST for n in (8, 12, 13)}

Subject = tuple[str, Callable[[], nn.Module], Any]


def subjects() -> Iterator[Subject]:
    """(name, factory, inputs) of every model."""
    for entry in CUSTOM:
        yield entry.name, entry.factory, entry.inputs
    for number, (geometry, _, _) in enumerate(NAMED):
        yield f"geometry_{number}", partial(decoder, geometry), partial(_batch, geometry)
    for name, (model_type, fields, _) in FAMILIES.items():
        yield name, partial(transformer, model_type, **fields), None
    for model_type in MIXTURES:
        yield f"{model_type}_experts", partial(transformer, model_type), None


def _batch(geometry: Any, model: nn.Module) -> dict[str, torch.Tensor]:
    return batch(geometry)


def run(subject: Subject, tp: int, every: bool) -> Survey:
    """The survey in float64, or in float32 where the model has an operator without float64."""
    _, factory, inputs = subject
    try:
        return survey(factory, tp=tp, inputs=inputs, every=every)
    except InputError as error:
        if "float64" not in str(error):
            raise
        return survey(factory, tp=tp, inputs=inputs, dtype=torch.float32, every=every)


def row(name: str, cells: list[str]) -> str:
    """One line of the table."""
    return f"{name:<28}" + "".join(f"{cell:>11}" for cell in cells)


def cell(caught: int, made: int) -> str:
    """caught/made, or a dot where nothing applies."""
    return f"{caught}/{made}" if made else "·"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2, help="number of ranks (2)")
    parser.add_argument("--only", nargs="+", default=[], help="names of models (all)")
    parser.add_argument("--every", action="store_true", help="mistakes in every block, not only in the first of those alike")
    given = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    chosen = [s for s in subjects() if not given.only or s[0] in given.only]
    unknown = set(given.only) - {s[0] for s in chosen}
    if unknown or given.tp < 2:
        parser.error(f"no model is called {', '.join(sorted(unknown))}" if unknown else "--tp: at least 2 ranks can make mistakes")
    started = time.monotonic()
    harmless: list[str] = []
    print(row("model", [kind.value for kind in Kind] + ["all"]))
    totals = {kind: [0, 0] for kind in Kind}
    survivors: list[str] = []
    for subject in chosen:
        try:
            found = run(subject, given.tp, given.every)
        except Exception as error:  # the table goes on; the exit code tells
            survivors.append(f"{subject[0]}: {type(error).__name__}: {str(error)[:300]}")
            print(row(subject[0], ["failed"]), flush=True)
            continue
        known = {m: HARMLESS[subject[0], str(m)] for m in found.survived if given.tp == 2 and (subject[0], str(m)) in HARMLESS}
        harmless += [f"{subject[0]}: {mutation}: {reason}" for mutation, reason in known.items()]
        if known:
            found = replace(found, survived=tuple(m for m in found.survived if m not in known))
        counts = [found.count(kind) for kind in Kind]
        for kind, (caught, made) in zip(Kind, counts, strict=True):
            totals[kind][0] += caught
            totals[kind][1] += made
        print(row(subject[0], [cell(*c) for c in [*counts, (len(found.caught), len(found.caught) + len(found.survived))]]), flush=True)
        survivors += [f"{subject[0]}: {mutation}" for mutation in found.survived]
    caught, made = (sum(t[i] for t in totals.values()) for i in (0, 1))
    print(row(f"{len(chosen)} models", [cell(*totals[kind]) for kind in Kind] + [cell(caught, made)]))
    print(f"{100 * caught / max(made, 1):.1f} % of {made} mistakes caught over tp={given.tp}, in {time.monotonic() - started:.0f} s")
    if harmless:
        print("\n".join(["no mistakes, since the answer is the same:", *(f"  {text}" for text in harmless)]))
    if survivors:
        print("\n".join(["not caught:", *(f"  {s}" for s in survivors)]))
        sys.exit(1)


if __name__ == "__main__":
    main()
