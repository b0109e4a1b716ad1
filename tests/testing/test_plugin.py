"""The pytest plugin, in pytest runs of their own: sizes, backends, markers, bad values, and tests that have a `tp` already."""

from __future__ import annotations

import pytest

pytest_plugins = ("pytester",)

HEAD = """
import pytest, torch
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))

X = torch.randn(2, 8)
"""


def run(pytester: pytest.Pytester, text: str, *options: str) -> pytest.RunResult:
    pytester.makepyfile(HEAD + text)
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:xdist", "-v", *options)


def test_three_lines(pytester: pytest.Pytester) -> None:
    text = """
@pytest.mark.tp(2, 3)
def test_it(tp):
    assert tp.assert_equivalent(Two, inputs=X, steps=1).tp == tp.size and tp.backend == "local" and range(9)[tp] == tp.size
"""
    result = run(pytester, text)
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["*test_it?tp2?*PASSED*", "*test_it?tp3?*PASSED*"])


@pytest.mark.parametrize("alone", [True, False])
def test_the_plugin_is_asked_for_by_its_name(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, alone: bool) -> None:
    if alone:
        monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    else:
        monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", raising=False)
    pytester.makepyfile("def test_it(tp): assert tp.size == 2")
    pytester.runpytest_subprocess("-p", "autotp", "-p", "no:cacheprovider").assert_outcomes(passed=1)
    without = pytester.runpytest_subprocess("-p", "no:autotp", "-p", "no:cacheprovider")
    without.assert_outcomes(errors=1)
    without.stdout.fnmatch_lines(["*fixture 'tp' not found*"])


def test_a_difference_fails_the_test(pytester: pytest.Pytester) -> None:
    text = """
import torch.distributed as dist

class Off(Two):
    def forward(self, x):
        return super().forward(x) + (dist.is_initialized() and dist.get_rank() == 1)

def test_it(tp):
    tp.assert_equivalent(Off, inputs=X)
"""
    result = run(pytester, text)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*first module that differs: <root>*"])


def test_options_and_markers(pytester: pytest.Pytester) -> None:
    text = """
def test_option(tp):
    assert tp.backend == "threads" and tp.assert_equivalent(Two, inputs=X).backend == "threads"

@pytest.mark.tp_backend("local")
def test_marker(tp):
    assert tp.backend == "local"
    assert tp.plan(Two(), example_inputs={"x": X}).tp == tp.size
    assert not tp.survey(Two, inputs=X).survived
"""
    result = run(pytester, text, "--tp", "2,3", "--tp-backend", "threads", "--strict-markers")
    result.assert_outcomes(passed=4)


def test_a_tp_of_its_own_is_left_alone(pytester: pytest.Pytester) -> None:
    text = """
@pytest.mark.parametrize("tp", [5])
def test_one(tp):
    assert tp == 5

@pytest.mark.parametrize(("a", "tp"), [(1, 5)])
def test_two(a, tp):
    assert tp == 5

class TestOwn:
    @pytest.fixture
    def tp(self):
        return 9

    def test_three(self, tp):
        assert tp == 9
"""
    run(pytester, text).assert_outcomes(passed=3)


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("def test_it(tp): pass", ("--tp", "two"), "--tp: got 'two', wanted numbers of ranks of at least 1"),
        ("def test_it(tp): pass", ("--tp", "2,0"), "--tp: got '2', '0'"),
        ("@pytest.mark.tp(0)\ndef test_it(tp): pass", (), "mark tp: got 0, wanted"),
        ("@pytest.mark.tp()\ndef test_it(tp): pass", (), "mark tp: got nothing, wanted"),
        ("@pytest.mark.tp_backend('mpi')\ndef test_it(tp): pass", (), "mark tp_backend is 'mpi', wanted one of local, threads, gloo"),
    ],
)
def test_bad_values(pytester: pytest.Pytester, text: str, options: tuple[str, ...], says: str) -> None:
    result = run(pytester, text, *options)
    assert result.ret != 0
    assert says in str(result.stdout) + str(result.stderr)
