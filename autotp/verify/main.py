"""`verify` starts the ranks, gathers their findings and writes the report."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autotp import targets
from autotp.arguments import seconds, whole_number
from autotp.errors import InputError
from autotp.launch import Outcome, RankError, run_ranks, values
from autotp.numeric.exact import DOUBLE, SINGLE
from autotp.recipe.recipe import Recipe
from autotp.testing.equivalence.module_calls import first_difference
from autotp.verify.report import Check, Report
from autotp.verify.worker import NEW_TOKENS, Parallelizer, check_rank, with_autotp

#: Models with more parameters are shrunk: what they would teach beyond a small one costs minutes and gigabytes.
MAX_PARAMETERS = 20_000_000


def verify(
    target: object,
    tp: int,
    *,
    inputs: str | Mapping[str, Any] | None = None,
    max_parameters: int = MAX_PARAMETERS,
    seed: int = 0,
    timeout: float = 300.0,
    recipe: Recipe | None = None,
    parallelizer: Parallelizer = with_autotp,
    on_event: Callable[[str], None] | None = None,
) -> Report:
    """Compare `target` run whole with `target` parallelized over `tp` gloo processes of this machine.

    Args:
        target: as in `autotp.targets`. Callables must be importable by name.
        inputs: keyword arguments of a call, or `package.module:callable` that returns them; needed where the target is no
            transformers model.
        max_parameters: a config with more is shrunk in depth and width, its structure and head counts kept; the report says so.
        timeout: seconds for all ranks together.
        recipe: what the model is parallelized by.
        parallelizer: what is verified; importable by name.
        on_event: called with what the ranks are doing now.

    Raises:
        InputError: the target or another argument is no good. A model that fails is a report, not an exception.
    """
    whole_number("verify: tp", tp)
    targets.check_ranks(tp)
    whole_number("verify: max_parameters", max_parameters, least=0)
    whole_number("verify: seed", seed, least=0, most=2**64 - 1)
    seconds("verify: timeout", timeout)
    if recipe is not None and not isinstance(recipe, Recipe):
        raise InputError(f"verify: recipe is {type(recipe).__name__}, wanted an autotp.Recipe; Recipe.load reads one")
    if not callable(parallelizer):
        raise InputError(f"verify: parallelizer is {parallelizer!r}, wanted a function")
    started = time.monotonic()
    loaded = targets.load(target)
    if isinstance(loaded, nn.Module) and any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers())):
        raise InputError("verify: the module is on the meta device; pass a config or a callable that builds it")
    model = targets.resolve(loaded)
    name = str(target) if isinstance(target, str | os.PathLike) else type(model).__name__
    count = sum(parameter.numel() for parameter in model.parameters())
    shrunk = ""
    if count > max_parameters:
        loaded, shrunk = _shrink(loaded, name, count, max_parameters, tp)
    with tempfile.TemporaryDirectory(prefix="autotp-verify-") as folder:
        job = {
            "target": target if isinstance(target, str) and callable(loaded) else loaded,
            "tp": tp,
            "inputs": inputs,
            "seed": seed,
            "parallelizer": parallelizer if recipe is None else partial(with_autotp, recipe=recipe),
            "folder": folder,
        }
        outcomes = run_ranks(check_rank, tp, job, timeout=timeout, on_event=_of_rank_zero(on_event))
        difference = _first_difference(Path(folder), tp, outcomes)
    common: dict[str, Any] = {"target": name, "tp": tp, "shrunk": shrunk, "seconds": time.monotonic() - started}
    try:
        found = values(outcomes)
    except RankError as error:
        return Report(model=type(model).__name__, parameters=count, checks=(), failure=str(error), first_difference=difference, **common)
    checks = (_worst("outputs", found), _worst("gradients", found), *_tokens(found))
    failed = not all(check.passed for check in checks)
    return Report(
        model=found[0]["model"],
        dtype=found[0]["dtype"],
        parameters=found[0]["parameters"],
        local_share=found[0]["local_share"],
        checks=checks,
        first_difference=difference if failed else "",
        **common,
    )


def _of_rank_zero(on_event: Callable[[str], None] | None) -> Callable[[int, Any], None]:
    return lambda rank, value: on_event(value) if on_event is not None and rank == 0 else None


def _shrink(config: Any, name: str, count: int, limit: int, tp: int) -> tuple[Any, str]:
    if not hasattr(config, "model_type"):
        raise InputError(f"target {name}: {count:,} parameters, more than the {limit:,} that are verified, and only configs can be shrunk")
    from autotp.twin.roles import Sizes
    from autotp.twin.shrink import shrink_config, sizes_like

    kept = "structure and head counts kept"
    try:
        small = shrink_config(config, sizes_like(config, tp))
        targets.resolve(small)
    except Exception:  # a config may tie head counts to sizes that became small: then usual ones
        small, kept = shrink_config(config, Sizes()), "structure kept, head counts not"
    return small, f"the target has {count:,} parameters; verified in small, {kept} (more than {limit:,} are shrunk)"


def _first_difference(folder: Path, tp: int, outcomes: tuple[Outcome, ...]) -> str:
    files = [folder / "reference.pt", *(folder / f"rank{rank}.pt" for rank in range(tp))]
    try:
        records = [torch.load(file, weights_only=True) for file in files]
    except (OSError, RuntimeError, EOFError):  # a rank ended before it wrote, or while it did; its traceback is in the report
        return ""
    double = any(tensor.dtype is torch.float64 for tensor in records[0].values())
    tolerance = (DOUBLE if double else SINGLE).tolerance
    complete = all(outcome.error is None for outcome in outcomes)
    return first_difference(records[0], records[1:], tolerance) if complete or any(records[1:]) else ""


def _worst(kind: str, found: list[dict[str, Any]]) -> Check:
    errors: dict[str, float] = {}
    for rank in found:
        for name, error in rank[kind].items():
            errors[name] = max(errors.get(name, 0.0), error)
    if found[0]["nan"]:
        return Check(kind, False, f"nothing is shown: the model itself gives NaN in {', '.join(found[0]['nan'])}")
    if not errors:
        return Check(kind, True, f"skipped: the model has no {kind} to compare")
    bad = [name for name, error in errors.items() if not error <= found[0]["tolerance"]]
    detail = f"{len(errors)} compared"
    if bad:
        detail = f"{len(bad)} of {len(errors)} differ: {', '.join(bad[:4])}{' …' if len(bad) > 4 else ''}"
    return Check(kind, not bad, detail, max(errors.values()))


def _tokens(found: list[dict[str, Any]]) -> tuple[Check, ...]:
    if found[0]["tokens"] is None:
        return ()
    wanted = found[0]["tokens"][0]
    if isinstance(wanted, str):
        return (Check("tokens", True, f"skipped: the model itself does not generate: {wanted.splitlines()[0]}"),)
    wrong = [rank for rank, result in enumerate(found) if result["tokens"][1] != wanted]
    if not wrong:
        return (Check("tokens", True, f"{NEW_TOKENS} greedy tokens of {len(wanted)} rows, equal on every rank"),)
    got = found[wrong[0]]["tokens"][1]
    return (Check("tokens", False, f"rank {wrong[0]} gives {got if isinstance(got, str) else got[0]}, wanted {wanted[0]}"),)
