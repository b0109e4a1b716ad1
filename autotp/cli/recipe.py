"""The command line of recipes: `autotp recipe init | check | diff | show | schema`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autotp.cli.options import InputsOption, TargetArgument, TpOption, examples, status
from autotp.errors import AutoTPError, InputError, RecipeError

if TYPE_CHECKING:
    from autotp.recipe.recipe import Recipe
    from autotp.verify import Report

app = typer.Typer(help="Write, check and compare recipes.", no_args_is_help=True, rich_markup_mode=None)

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file, or name of a bundled recipe")]

_HEAD = """\
{model}, as autotp plans it over {tp} ranks. Edit it, then: autotp recipe check FILE {target} --tp N

A layout names the factors of each dim, major to minor; (a | b) is a concatenation. What is listed under shard: is cut over the ranks.
A * in a name stands for any characters; the last parts of a name are enough."""


@app.command()
def init(
    target: TargetArgument,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="file to write instead of stdout")] = None,
    tp: Annotated[int, typer.Option("--tp", min=2, help="number of ranks that it is planned for")] = 2,
    inputs: InputsOption = None,
    force: Annotated[bool, typer.Option("--force", help="write over a file that is there")] = False,
) -> None:
    """Write the recipe of TARGET as the planner would lay it out. Where TARGET cannot be traced, the recipe keeps everything whole."""
    if output is not None and output.exists() and not force:
        raise InputError(f"{output} exists; --force writes over it")
    text = _text(target, tp, inputs)
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{output}: cannot be written: {error.strerror}") from error
    typer.echo(f"wrote {output}", err=True)


def _text(target: str, tp: int, inputs: str | None) -> str:
    import autotp
    from autotp import targets
    from autotp.errors import TraceError
    from autotp.recipe.dump import text_of
    from autotp.recipe.from_plan import comments_of, size_comments
    from autotp.recipe.recipe import Recipe
    from autotp.recipe.starter import skeleton

    model = targets.resolve(target)
    head = _HEAD.format(model=type(model).__name__, tp=tp, target=target)
    try:
        plan = autotp.plan(model, tp=tp, example_inputs=examples(inputs))
    except TraceError as error:
        typer.echo(f"not traced, so nothing is planned and everything stands under whole: {error}", err=True)
        return text_of(
            skeleton(model), head=f"{type(model).__name__}, with everything whole: it could not be traced.\n{head.partition(chr(10))[2]}"
        )
    recipe = Recipe.from_plan(plan, model=model, pin=False)
    notes = comments_of(plan, recipe) | size_comments(recipe, getattr(model, "config", None))
    return text_of(recipe, head=head, comments=notes)


@app.command()
def check(
    recipe: RecipeArgument,
    target: TargetArgument,
    tp: TpOption,
    inputs: InputsOption = None,
    timeout: Annotated[float, typer.Option(help="seconds for all ranks together")] = 300.0,
) -> None:
    """Check RECIPE against TARGET: its form, its layouts, a proof where TARGET can be traced, and numbers over TP processes."""
    try:
        report, notes = _checked(recipe, target, tp, inputs, timeout)
    except RecipeError as error:
        for problem in error.problems:
            typer.echo(f"error: {problem}", err=True)
        raise typer.Exit(1) from None
    except AutoTPError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None
    for note in notes:
        typer.echo(f"note: {note}")
    typer.echo(str(report), err=not report.passed)
    raise typer.Exit(0 if report.passed else 1)


def _checked(source: str, target: str, tp: int, inputs: str | None, timeout: float) -> tuple[Report, tuple[str, ...]]:
    import autotp
    from autotp import targets
    from autotp.recipe.recipe import Recipe
    from autotp.verify import verify

    recipe = Recipe.load(source)
    with status("checking the layouts") as update:
        model = targets.resolve(target)
        plan = autotp.plan(model, tp=tp, recipe=recipe, example_inputs=examples(inputs))
        return verify(target, tp, inputs=inputs, recipe=recipe, timeout=timeout, on_event=update), plan.notes


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="YAML file, or name of a bundled recipe")],
    b: Annotated[str, typer.Argument(metavar="B", help="the other one")],
    exit_code: Annotated[bool, typer.Option("--exit-code", help="exit with 1 where they differ")] = False,
) -> None:
    """Print the differences of recipe B from recipe A, each with all that it inherits. Comments and the order of lines do not count."""
    from autotp.recipe.recipe import Recipe

    lines = list(_differences(Recipe.load(a), Recipe.load(b)))
    typer.echo("\n".join(lines) if lines else "no difference")
    raise typer.Exit(1 if lines and exit_code else 0)


def _differences(a: Recipe, b: Recipe) -> Iterator[str]:
    from autotp.recipe.dump import data_of

    left, right = _flat(data_of(a)), _flat(data_of(b))
    for key in dict.fromkeys((*left, *right)):
        if left.get(key) == right.get(key):
            continue
        if key in left:
            yield f"- {key}: {left[key]}"
        if key in right:
            yield f"+ {key}: {right[key]}"


def _flat(data: dict[str, object]) -> dict[str, str]:
    """Returns one line for each entry of a recipe.

    A parameter stands under its name alone, so that another role is a difference of one name.
    """
    from autotp.recipe.spec import Role

    roles = {role.value for role in Role}
    out: dict[str, str] = {}
    for name, value in data.items():
        if not isinstance(value, dict) or name == "plan":
            out[name] = "(an exact plan)" if name == "plan" else str(value)
            continue
        for key, item in value.items():
            text = f'"{item}"' if isinstance(item, str) else str(item)
            out[key if name in roles else f"{name}.{key}"] = f"{name} {text}" if name in roles else text
    return out


@app.command()
def show(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="bundled recipe, model type or file; without one, what there is")
    ] = None,
) -> None:
    """Print a recipe with everything that it inherits."""
    from autotp.recipe import bundled
    from autotp.recipe.dump import text_of
    from autotp.recipe.recipe import Recipe

    if name is None:
        for each in bundled.names():
            recipe = Recipe.load(each)
            typer.echo(f"{each:<12} {recipe.about} ({', '.join(recipe.families)})")
        return
    source = bundled.find(name).read_text(encoding="utf-8")
    head = "\n".join(line.removeprefix("#").strip() for line in source.partition("\n\n")[0].splitlines() if line.startswith("#"))
    typer.echo(text_of(Recipe.load(name), head=head), nl=False)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipe files, for editors."""
    from autotp.recipe.schema import json_schema

    typer.echo(json_schema(), nl=False)
