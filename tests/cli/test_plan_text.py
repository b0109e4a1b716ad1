"""A plan on a terminal is no wider than it, coloured by kind, and says each reason once; elsewhere it is plain."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

import autotp
from autotp.cli.plan_text import show
from autotp.plan.kinds import Kind
from autotp.plan.plan import Plan
from autotp.plan.rows import table
from tests.support.families import transformer

ROOT = Path(__file__).parent.parent.parent
ESCAPE = re.compile(r"\x1b\[[\d;]*m")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return autotp.plan(transformer("whisper"), tp=4, check="graph")


def shown(plan: Plan, width: int, **options: bool) -> str:
    out = io.StringIO()
    show(plan, Console(file=out, width=width, force_terminal=True, color_system="standard", _environ={}), **options)
    return out.getvalue()


@pytest.mark.parametrize("why", [False, True])
@pytest.mark.parametrize("width", [20, 40, 79, 80, 120, 300])
def test_nothing_is_wider_than_the_window(plan, width, why):
    lines = ESCAPE.sub("", shown(plan, width, why=why)).split("\n")
    assert max(map(cell_len, lines)) <= width
    assert len(lines) > len(table(plan).rows)


def test_a_wide_window_has_a_row_for_each_parameter_and_every_kind_a_colour(plan):
    text = shown(plan, 300)
    rows = [line for line in ESCAPE.sub("", text).split("\n") if line.startswith(("model.", "proj_out"))]
    assert len([line for line in rows if any(kind in line for kind in Kind)]) == len(table(plan).rows)
    colours = {kind: re.findall(rf"(\x1b\[\d+m){kind.value}", text) for kind in {row.kind for row in table(plan).rows}}
    assert all(len(set(found)) == 1 for found in colours.values())
    assert len({found[0] for found in colours.values()}) == len(colours) == 4


def test_why_says_reasons_in_full_and_names_the_parameters(plan):
    reason = next(r for r in table(plan).reasons if len(r) > 90)
    short, full = (" ".join(ESCAPE.sub("", shown(plan, 80, why=why)).split()) for why in (False, True))
    assert reason not in short and reason in full and "--why" in short and "--why" not in full
    assert full.count("model.encoder.layer_norm.weight") == short.count("model.encoder.layer_norm.weight") + 1


def test_without_colour(plan):
    out = io.StringIO()
    show(plan, Console(file=out, width=80, force_terminal=True, _environ={"NO_COLOR": "1"}))
    assert not re.search(r"\x1b\[3\dm", out.getvalue())


@pytest.mark.programs
def test_the_command_on_a_terminal_and_in_a_pipe():
    """A real terminal of 72 columns has colours and is filled; a pipe has neither, and the whole text."""
    command = [sys.executable, "-m", "autotp", "plan", "tests.cli.test_commands:mlp", "--tp", "2"]
    command += ["--inputs", "tests.cli.test_commands:mlp_inputs"]
    unwanted = ("NO_COLOR", "COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE")
    environment = {name: value for name, value in os.environ.items() if name not in unwanted} | {"TERM": "xterm", "PYTHONPATH": str(ROOT)}
    piped = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=100)
    assert "\x1b" not in piped.stdout + piped.stderr and max(map(len, piped.stdout.split("\n"))) > 72
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 72, 0, 0))
    subprocess.run(command, cwd=ROOT, env=environment, stdout=theirs, stderr=subprocess.DEVNULL, check=True, timeout=100)
    os.close(theirs)
    text = b""
    while chunk := _read(ours):
        text += chunk
    lines = ESCAPE.sub("", text.decode().replace("\r\n", "\n")).split("\n")
    assert b"\x1b[34m" in text and max(map(cell_len, lines)) <= 72


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other end is closed, and everything was read
        return b""
