"""The pytest plugin gives a `tp` fixture and two markers, so that a test of a model is three lines.

    @pytest.mark.tp(2, 3)
    def test_my_model(tp):
        tp.assert_equivalent(MyModel, inputs=torch.randn(2, 5, 64))

The test runs once for each number of ranks; without the marker for those of `--tp` (2). `@pytest.mark.tp_backend("gloo")` runs the
ranks as processes, as `--tp-backend` does for all tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from autotp.plan.plan import Plan
    from autotp.testing.equivalence.check import Equivalence
    from autotp.testing.sabotage import Survey

_BACKENDS = ("local", "threads", "gloo")  # `autotp.testing.ranks.run.BACKENDS`, which would import torch in every pytest run


@dataclass(frozen=True, slots=True)
class TP:
    """The value of the fixture `tp`: the number of ranks `size` and the `backend` of this run of the test."""

    size: int
    backend: str

    def assert_equivalent(self, factory: Any, **options: Any) -> Equivalence:
        """Calls `autotp.testing.assert_equivalent` with this many ranks; options are its keyword arguments.

        Raises:
            NotEquivalent, InputError, TraceError, PlanError, RecipeError: as there.
        """
        from autotp.testing.equivalence.check import assert_equivalent

        return assert_equivalent(factory, **{"tp": self.size, "backend": self.backend, **options})

    def survey(self, factory: Any, **options: Any) -> Survey:
        """Calls `autotp.testing.sabotage.survey` with this many ranks: it makes every mistake and checks that it is caught.

        Raises:
            NotEquivalent, InputError, TraceError, PlanError: as there.
        """
        from autotp.testing.sabotage import survey

        return survey(factory, **{"tp": self.size, "backend": self.backend, **options})

    def plan(self, target: Any, **options: Any) -> Plan:
        """Calls `autotp.plan` for this many ranks.

        Raises:
            InputError, TraceError, PlanError, RecipeError: as there.
        """
        import autotp

        return autotp.plan(target, tp=self.size, **options)

    def __index__(self) -> int:
        """Returns the number of ranks: the fixture can stand where a number is wanted."""
        return self.size


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options `--tp` and `--tp-backend`."""
    group = parser.getgroup("autotp", "tensor parallelism")
    group.addoption("--tp", default="2", metavar="N,…", help="numbers of ranks for tests with the tp fixture (2)")
    group.addoption("--tp-backend", default="local", choices=_BACKENDS, help="what these ranks are: see autotp.testing (local)")


def pytest_configure(config: pytest.Config) -> None:
    """Registers the markers and checks the options.

    Raises:
        pytest.UsageError: `--tp` is no list of whole numbers.
    """
    config.addinivalue_line("markers", "tp(*sizes): run with each of these numbers of ranks (fixture `tp`)")
    config.addinivalue_line("markers", 'tp_backend(name): what the ranks of the fixture `tp` are: "local", "threads" or "gloo"')
    _sizes(config.getoption("--tp").split(","), "--tp")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs the test once for each number of ranks; a test with a `tp` of its own is left alone."""
    if "tp" not in metafunc.fixturenames or _has_own(metafunc):
        return
    marker = metafunc.definition.get_closest_marker("tp")
    if marker is None:
        sizes = _sizes(metafunc.config.getoption("--tp").split(","), "--tp")
    else:
        sizes = _sizes(marker.args, f"{metafunc.definition.nodeid}: mark tp")
    metafunc.parametrize("tp", sizes, indirect=True, ids=[f"tp{n}" for n in sizes])


def _has_own(metafunc: pytest.Metafunc) -> bool:
    """True where the test parametrizes `tp`, or defines it as a fixture."""
    named: list[str] = []
    for marker in metafunc.definition.iter_markers("parametrize"):
        names = marker.args[0] if marker.args else marker.kwargs.get("argnames", ())
        named += [n.strip() for n in names.split(",")] if isinstance(names, str) else names
    fixtures = metafunc._arg2fixturedefs.get("tp", ())
    return "tp" in named or not fixtures or fixtures[-1].func.__module__ != __name__


def _sizes(values: Any, where: str) -> list[int]:
    try:
        sizes = [int(value) for value in values]
    except (TypeError, ValueError):
        sizes = []
    if not sizes or min(sizes) < 1:
        raise pytest.UsageError(f"{where}: got {', '.join(map(repr, values)) or 'nothing'}, wanted numbers of ranks of at least 1")
    return sizes


@pytest.fixture
def tp(request: pytest.FixtureRequest) -> TP:
    """Gives the ranks for this test: `tp.assert_equivalent(factory, inputs=…)`."""
    marker = request.node.get_closest_marker("tp_backend")
    backend = request.config.getoption("--tp-backend") if marker is None else next(iter(marker.args), None)
    if backend not in _BACKENDS:
        raise pytest.UsageError(f"{request.node.nodeid}: mark tp_backend is {backend!r}, wanted one of {', '.join(_BACKENDS)}")
    return TP(request.param, backend)
