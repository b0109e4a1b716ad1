"""The command line: `autotp plan | explain | report | verify | advise | calibrate | shard | unshard | recipe | demo`.

Exit codes: 0 done, 1 a verification or the demo failed, 2 bad input. Errors are lines on stderr, `error: ...`; results go to
stdout, progress to stderr. The commands that need torch import it; `--help` does not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console

from autotp.cli.advise import advise, calibrate
from autotp.cli.checkpoint import shard, unshard
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
    status,
)
from autotp.cli.output import print_json
from autotp.cli.recipe import app as recipe_app
from autotp.cli.report import report
from autotp.errors import AutoTPError, RecipeError

app = typer.Typer(name="autotp", help="Tensor parallelism for any PyTorch model.", add_completion=False, rich_markup_mode=None)
app.add_typer(recipe_app, name="recipe")
app.command()(report)
app.command()(advise)
app.command()(calibrate)
app.command()(shard)
app.command()(unshard)

# The base of typer's usage errors lives in click or in typer's own copy of it, depending on the version.
_USAGE_ERROR: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")

JsonOption = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]


@app.command()
def plan(
    target: TargetArgument,
    tp: TpOption,
    as_json: JsonOption = False,
    inputs: InputsOption = None,
    recipe: RecipeOption = None,
    check: CheckOption = "numbers",
    loss_parallel: LossParallelOption = False,
    sequence_parallel: SequenceParallelOption = "off",
    experts: ExpertsOption = "width",
    tokens: Annotated[int | None, typer.Option(min=1, help="also print the bytes moved for so many tokens, in bfloat16")] = None,
    why: Annotated[bool, typer.Option("--why", help="on a terminal: say each reason in full, and which parameters have it")] = False,
) -> None:
    """Print how TARGET would be sharded, what stays whole and why, and what each token costs in bytes moved."""
    made = make_plan(target, tp, inputs, recipe, check, placements(loss_parallel, sequence_parallel, experts))
    if as_json:
        print_json(made.to_dict())
        return
    console = Console()
    if console.is_terminal:
        from autotp.cli.plan_text import show

        show(made, console, why=why)
    else:
        typer.echo(str(made))
    if tokens is not None:
        from autotp.cli.tables import collectives_table

        Console(soft_wrap=True).print("\n", collectives_table(made.collectives(tokens=tokens), tokens))


@app.command()
def explain(
    target: TargetArgument,
    name: Annotated[str, typer.Argument(metavar="PARAM_OR_MODULE")],
    tp: TpOption,
    inputs: InputsOption = None,
    recipe: RecipeOption = None,
    check: CheckOption = "numbers",
    loss_parallel: LossParallelOption = False,
    sequence_parallel: SequenceParallelOption = "off",
    experts: ExpertsOption = "width",
) -> None:
    """Say why one parameter or module of TARGET is sharded as it is, or why it is not. The last parts of its name are enough."""
    typer.echo(make_plan(target, tp, inputs, recipe, check, placements(loss_parallel, sequence_parallel, experts)).explain(name))


@app.command()
def verify(
    target: TargetArgument,
    tp: TpOption,
    as_json: JsonOption = False,
    inputs: InputsOption = None,
    recipe: RecipeOption = None,
    timeout: Annotated[float, typer.Option(help="seconds for all ranks together")] = 300.0,
) -> None:
    """Run TARGET whole and over TP processes of this machine with random weights; compare outputs, gradients, tokens."""
    from autotp.recipe.recipe import Recipe
    from autotp.verify import verify as run

    with status("starting the ranks") as update:
        followed = None if recipe is None else Recipe.load(recipe)
        found = run(target, tp, inputs=inputs, recipe=followed, timeout=timeout, on_event=update)
    if as_json:
        print_json(found.to_dict())
    else:
        typer.echo(str(found))
    raise typer.Exit(0 if found.passed else 1)


@app.command()
def demo(
    question: Annotated[str, typer.Option(help="what to ask the model")] = "What is the capital of France?",
    tokens: Annotated[int, typer.Option(min=1, help="most tokens to generate")] = 40,
) -> None:
    """Run SmolLM2-135M-Instruct on 2 processes and compare it with one."""
    from autotp.cli.demo import run_demo

    raise typer.Exit(run_demo(question, tokens))


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"autotp {version('autotp')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the console script: it sets the defaults of the environment, and exits with the code of `run`."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    try:
        code = app(args=None if arguments is None else list(arguments), standalone_mode=False)
    except RecipeError as error:
        return [_fail(problem) for problem in error.problems][-1]
    except AutoTPError as error:
        asks = "example_inputs" in str(error)
        return _fail(f"{error}{' (on the command line: --inputs MODULE:CALLABLE, which returns them)' if asks else ''}")
    except typer.Abort:
        return _fail("interrupted", 130)
    except _USAGE_ERROR as error:
        return _fail(error.format_message())
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int = 2) -> int:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return code
