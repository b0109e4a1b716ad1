"""`python -m autotp.testing.fuzz --minutes 30` draws models until the time is up, and writes every failure down as a script.

Three families take turns: architectures (transformer-like, must be equal), idioms (small, must be equal or refused) and configs of
transformers. Hypothesis shrinks a failure first. A report at the end counts the examples of each variant, number of ranks, model
type and kind of layout, and the refused idioms. Another `--seed` draws other models.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from torch import Tensor

from autotp.errors import AutoTPError
from autotp.testing.architectures.architecture import Architecture
from autotp.testing.equivalence.check import assert_equivalent
from autotp.testing.idioms.idioms import Idioms
from autotp.testing.outcome import equal_or_refused
from autotp.testing.proving import features, prove, traits, variants
from autotp.testing.strategies import architectures, configs, degrees, idioms

#: Model types of transformers whose configs are drawn; one for each kind of layout.
MODEL_TYPES = [
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "cohere",
    "stablelm",
    "gpt2",
    "gpt_neox",
    "gptj",
    "phi",
    "phi3",
    "bloom",
    "mpt",
    "falcon",
    "opt",
    "codegen",
    "gpt_bigcode",
    "mixtral",
    "qwen3_moe",
    "deepseek_v3",
    "t5",
    "bert",
    "mamba2",
    "starcoder2",
    "glm4",
    "granite",
    "bart",
]
FAMILIES = ("architectures", "idioms", "configs")
_TURNS = ("architectures", "idioms", "architectures", "idioms", "configs")
_BATCH = 60
_SETTINGS = settings(
    max_examples=_BATCH,
    deadline=None,
    database=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
    print_blob=False,
    report_multiple_bugs=False,
)


class Fuzzer:
    """Counts the examples that it draws, and keeps those that fail."""

    def __init__(self, folder: Path, until: float, write: Callable[[str], None], certificate: str = "numbers") -> None:
        self.folder, self.until, self.write, self.certificate = folder, until, write, certificate
        self.covered: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.failures: dict[str, str] = {}
        self.stopped = False
        self._last: tuple[str, str] | None = None

    def architecture(self, seed: int) -> None:
        """Draws and checks a batch of architectures."""

        @seeded(seed)
        @_SETTINGS
        @given(architectures(), degrees())
        def attempt(architecture: Architecture, tp: int) -> None:
            self._attempt(lambda: script_of_architecture(architecture, tp, self.certificate), lambda: self._prove(architecture, tp))

        self._batch(attempt)

    def idioms(self, seed: int) -> None:
        """Draws and checks a batch of idioms."""

        @seeded(seed)
        @_SETTINGS
        @given(idioms(), degrees(most=4))
        def attempt(drawn: Idioms, tp: int) -> None:
            self._attempt(lambda: script_of_idioms(drawn, tp, self.certificate), lambda: self._equal_or_refused(drawn, tp))

        self._batch(attempt)

    def config(self, model_type: str, seed: int) -> None:
        """Draws and checks a batch of configs of one model type."""

        @seeded(seed)
        @_SETTINGS
        @given(configs(model_type), degrees())
        def attempt(config: Any, tp: int) -> None:
            self._attempt(lambda: script_of_config(config, tp, self.certificate), lambda: self._equal(config, tp))

        self._batch(attempt)

    def _prove(self, architecture: Architecture, tp: int) -> None:
        plan = prove(architecture, tp, certificate=self.certificate).plan
        self.covered.update([f"tp={tp}", *variants(architecture), *(f"plan: {f}" for f in features(plan))])
        self.reasons.update({plan.replicated[n] for n in plan.replicated_products})

    def _equal_or_refused(self, drawn: Idioms, tp: int) -> None:
        outcome = equal_or_refused(drawn.build, inputs=drawn.inputs(), tp=tp, more=drawn.more(), certificate=self.certificate)
        if outcome.equal is None:
            self.outcomes["refused"] += 1
            self.refusals[" ".join(outcome.refused.split())[:160]] += 1
            return
        self.outcomes["sharded" if outcome.sharded else "whole"] += 1
        self.covered.update([f"tp={tp}", *traits(drawn), *(f"plan: {f}" for f in features(outcome.equal.plan))])

    def _equal(self, config: Any, tp: int) -> None:
        plan = assert_equivalent(config, tp=tp, steps=2, certificate=self.certificate).plan
        self.covered.update([f"tp={tp}", f"type={config.model_type}", *(f"plan: {f}" for f in features(plan))])

    def _attempt(self, script: Callable[[], str], work: Callable[[], None]) -> None:
        if time.monotonic() > self.until and self._last is None:
            return
        try:
            work()
        except (AutoTPError, AssertionError) as error:
            self._last = script(), f"{type(error).__name__}: {error}"
            raise

    def _batch(self, attempt: Callable[[], None]) -> None:
        self._last = None
        try:
            attempt()
        except KeyboardInterrupt:
            self.stopped = True
        except Exception as error:  # any error of an example is a failure to report
            text, why = self._last or ("", f"{type(error).__name__}: {error}")
            name = f"fuzz_{hashlib.sha1(text.encode()).hexdigest()[:10]}.py"
            if name not in self.failures:
                self.failures[name] = why
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / name).write_text(text + "".join(f"# {line}\n" for line in why.splitlines()), encoding="utf-8")
                self.write(f"FAILED, see {self.folder / name}\n" + "\n".join(why.splitlines()[:12]))

    def report(self) -> str:
        """Returns the text that says how many examples of each kind there were, and which failed."""
        groups: dict[str, list[str]] = {}
        for name, count in sorted(self.covered.items()):
            group, _, value = name.partition("=" if "=" in name else ": ")
            groups.setdefault(group, []).append(f"{value} {count}")
        total = sum(n for name, n in self.covered.items() if name.startswith("tp="))
        lines = [f"{total} examples were equal; how many there were of each kind:"]
        lines += [f"  {group}: {', '.join(values)}" for group, values in groups.items()]
        if self.outcomes:
            ran = self.outcomes.total()
            shares = ", ".join(
                f"{self.outcomes[name]} {name} ({self.outcomes[name] / ran:.0%})" for name in ("sharded", "whole", "refused")
            )
            lines.append(f"idioms: {shares}")
            lines += [f"  refused {count} × {why}" for why, count in self.refusals.most_common(12)]
        if self.reasons:
            lines.append("why weights stayed whole (architectures, the most frequent):")
            lines += [f"  {count} × {reason}" for reason, count in self.reasons.most_common(12)]
        lines.append(
            f"{len(self.failures)} failed" + ("".join(f"\n  {self.folder / name}" for name in self.failures) if self.failures else "")
        )
        return "\n".join(lines)


def script_of_architecture(architecture: Architecture, tp: int, certificate: str = "numbers") -> str:
    """Returns a script with the model's text that fails as the example did."""
    trap = "".join(
        f"assert result.plan.params[{name!r}].layout.dim != {dim}  # {architecture.trap.value}\n" for name, dim in architecture.kept()
    )
    rows = {name: tensor.tolist() for name, tensor in architecture.inputs().items()}
    return (
        f"# {architecture!r}\n\n{architecture.source()}\n\n"
        "from autotp.testing import assert_equivalent\nfrom autotp.testing.tiny.models import randomise\n\n\n"
        "def model():\n    made = Model()\n    randomise(made, seed=3)\n    return made.double()\n\n\n"
        f"rows = {rows!r}\ninputs = {{name: torch.tensor(row) for name, row in rows.items()}}\n"
        f"result = assert_equivalent(model, tp={tp}, inputs=inputs, steps=3, certificate={certificate!r})\n{trap}"
    )


def script_of_idioms(drawn: Idioms, tp: int, certificate: str = "numbers") -> str:
    """Returns a script with the model's text that fails as the example did."""
    more = {name: {key: "1e6 * x" if isinstance(v, Tensor) else repr(v) for key, v in call.items()} for name, call in drawn.more().items()}
    calls = ", ".join(f"{name!r}: {{{', '.join(f'{key!r}: {v}' for key, v in call.items())}}}" for name, call in more.items())
    return (
        f"# {drawn!r}\n\n{drawn.source()}\n\n"
        "from autotp.testing.outcome import equal_or_refused\nfrom autotp.testing.tiny.models import randomise\n\n\n"
        "def model():\n    torch.manual_seed(0)\n    made = Model()\n    randomise(made, seed=3)\n    return made.double()\n\n\n"
        f"x = torch.randn(2, 6, {drawn.outer}, generator=torch.Generator().manual_seed(1), dtype=torch.float64)\n"
        f"print(equal_or_refused(model, inputs={{'x': x}}, tp={tp}, more={{{calls}}}, certificate={certificate!r}))\n"
    )


def script_of_config(config: Any, tp: int, certificate: str = "numbers") -> str:
    """Returns a script with the config that fails as the example did."""
    fields = {n: v for n, v in config.to_diff_dict().items() if n not in ("model_type", "transformers_version")}
    attention = config._attn_implementation
    return (
        "from transformers import CONFIG_MAPPING\n\nfrom autotp.testing import assert_equivalent\n\n"
        f"config = CONFIG_MAPPING[{config.model_type!r}](**{fields!r})\nconfig._attn_implementation = {attention!r}\n"
        f"assert_equivalent(config, tp={tp}, steps=2, certificate={certificate!r})\n"
    )


def fuzz(
    minutes: float, folder: Path, seed: int = 0, family: str = "", write: Callable[[str], None] = print, certificate: str = "numbers"
) -> Fuzzer:
    """Draws models for `minutes`; `family`: one of `FAMILIES`, or all in turns. `certificate`: as for `assert_equivalent`."""
    fuzzer = Fuzzer(folder, time.monotonic() + 60 * minutes, write, certificate)
    number = 0
    while time.monotonic() < fuzzer.until and not fuzzer.stopped:
        at = seed * 1_000_000 + number
        match family or _TURNS[number % len(_TURNS)]:
            case "configs":
                fuzzer.config(MODEL_TYPES[number // (1 if family else len(_TURNS)) % len(MODEL_TYPES)], at)
            case "idioms":
                fuzzer.idioms(at)
            case _:
                fuzzer.architecture(at)
        number += 1
    return fuzzer


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m autotp.testing.fuzz", description=str(__doc__).split("\n\n")[1])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to draw (10)")
    parser.add_argument("--seed", type=int, default=0, help="which models are drawn (0)")
    parser.add_argument("--out", type=Path, default=Path("fuzz"), help="folder for scripts that reproduce failures (fuzz)")
    parser.add_argument("--family", choices=FAMILIES, default="", help="draw only these (all in turns)")
    parser.add_argument(
        "--certificate", choices=("numbers", "graph"), default="numbers", help="how plans are checked before they are run (numbers)"
    )
    given = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # torch warns about the models drawn
    done = fuzz(given.minutes, given.out, given.seed, given.family, lambda text: print(text, flush=True), given.certificate)  # noqa: T201
    print(done.report())  # noqa: T201
    sys.exit(1 if done.failures else 0)


if __name__ == "__main__":
    main()
