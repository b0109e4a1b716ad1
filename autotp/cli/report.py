"""`autotp report`: a plan as a page of one HTML file, and what differs from other plans."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autotp.cli.options import (
    CheckOption,
    ExpertsOption,
    InputsOption,
    LossParallelOption,
    RecipeOption,
    SequenceParallelOption,
    TargetArgument,
    TpOption,
    make_plan,
    placements,
)
from autotp.cli.output import check_folder, write_file


def report(
    target: TargetArgument,
    tp: TpOption,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="file to write, over what is there")],
    against: Annotated[
        list[str] | None, typer.Option("--against", metavar="TP|RECIPE", help="say what differs at another tp or by a recipe; repeatable")
    ] = None,
    inputs: InputsOption = None,
    recipe: RecipeOption = None,
    check: CheckOption = "numbers",
    loss_parallel: LossParallelOption = False,
    sequence_parallel: SequenceParallelOption = "off",
    experts: ExpertsOption = "width",
) -> None:
    """Write the plan of TARGET as a page: the model as blocks, what is sent, memory, a table to search. One file, no network."""
    from autotp.pages.render import require
    from autotp.recipe.recipe import Recipe

    require()
    check_folder(output)
    placed = placements(loss_parallel, sequence_parallel, experts)
    others = list(dict.fromkeys(against or ()))
    for other in others:
        if not other.isdecimal():
            Recipe.load(other)  # a mistake in it costs no planning
    made = make_plan(target, tp, inputs, recipe, check, placed)
    plans = {}
    for other in others:
        by_tp = other.isdecimal()
        name = f"tp={int(other)}" if by_tp else other
        plans[name] = make_plan(target, int(other) if by_tp else tp, inputs, recipe if by_tp else other, check, placed)
    text = made.to_html(against=plans)
    write_file(output, text)
    typer.echo(f"wrote {output} ({len(text.encode()) / 1000:.0f} kB)", err=True)
