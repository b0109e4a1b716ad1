"""The command line: exit codes, one-line errors, text and JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

import autotp
from autotp.cli import commands
from autotp.cli.tables import byte_count, collectives_table
from autotp.errors import InputError
from autotp.verify import Check, Report


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = commands.run(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing command"),
        (("bogus",), "No such command 'bogus'"),
        (("plan",), "Missing argument 'TARGET'"),
        (("plan", "llama"), "Missing option '--tp'"),
        (("plan", "llama", "--tp", "0"), "Invalid value for '--tp'"),
        (("plan", "lama", "--tp", "2"), "near names: llama"),
        (("explain", "lama", "x", "--tp", "2"), "near names: llama"),
        (("verify", "lama", "--tp", "2"), "near names: llama"),
        (("verify", "no/such/config.json", "--tp", "2"), "nothing is downloaded"),
        (("plan", "gpt2", "--tp", "1000000"), "tp is 1000000, wanted at most 1024"),
        (("plan", "gpt2", "--tp", "2", "--experts", "all"), "experts is 'all', wanted one of 'width', 'whole', 'auto'"),
        (("explain", "gpt2", "x", "--tp", "1000000"), "tp is 1000000, wanted at most 1024"),
        (("verify", "gpt2", "--tp", "1000000"), "tp is 1000000, wanted at most 1024"),
        (("report", "gpt2", "--tp", "2"), "Missing option '-o'"),
        (("report", "gpt2", "--tp", "2", "-o", "no/such/page.html"), "there is no folder"),
        (("report", "gpt2", "--tp", "2", "-o", "/"), "is a folder, wanted a file"),
        (("report", "lama", "--tp", "2", "-o", "page.html"), "near names: llama"),
        (("report", "gpt2", "--tp", "2", "-o", "page.html", "--against", "no/such.yaml"), "no/such.yaml"),
        (("recipe", "init", "gpt2", "--tp", "1000000"), "tp is 1000000, wanted at most 1024"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(run, arguments, message):
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_version(run):
    code, out, _ = run("--version")
    assert (code, out) == (0, "autotp 0.1.0\n")


@pytest.mark.parametrize("command", [(), ("plan",), ("explain",), ("report",), ("verify",), ("demo",)])
def test_help(run, command):
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert "Usage: " in out


def test_the_module_runs_as_a_program():
    done = subprocess.run([Path(sys.executable).with_name("autotp"), "plan"], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: Missing argument 'TARGET'.\n"


PASSED = Report("t", "Model", 2, 1234, (Check("outputs", True, "1 compared", 1e-15),))
FAILED = Report("t", "Model", 2, 1234, (Check("outputs", False, "1 of 1 differ: output", float("inf")),), first_difference="a.b: so")


@pytest.mark.parametrize(("report", "code"), [(PASSED, 0), (FAILED, 1)])
def test_verify_exits_with_its_verdict(run, monkeypatch, report, code):
    asked = {}

    def verify(target, tp, **options):
        asked.update(target=target, tp=tp)
        return report

    monkeypatch.setattr("autotp.verify.verify", verify)
    got, out, _ = run("verify", "t", "--tp", "2")
    assert got == code
    assert asked == {"target": "t", "tp": 2}
    assert ("FAILED" in out) == bool(code)
    assert ("first difference: a.b: so" in out) == bool(code)
    got, out, _ = run("verify", "t", "--tp", "2", "--json")
    found = json.loads(out)
    assert got == code
    assert found["passed"] is (code == 0)
    assert found["checks"][0]["error"] == (None if code else 1e-15)


def test_a_rank_that_raised_is_printed_whole(run, monkeypatch):
    report = Report("t", "Model", 2, 1, (), failure="rank 1 failed:\nTraceback\n  ValueError: x")
    monkeypatch.setattr("autotp.verify.verify", lambda *a, **k: report)
    code, out, _ = run("verify", "t", "--tp", "2")
    assert code == 1
    assert "ValueError: x" in out


@dataclass(frozen=True)
class Collective:
    module: str
    kind: str
    when: str
    bytes: int


class FakePlan:
    def __str__(self):
        return "the plan's table"

    def to_dict(self):
        return {"tp": 2, "share": float("inf")}

    def explain(self, name):
        if name == "nothing":
            raise InputError("no nothing\nhere")
        return f"why {name}"

    def collectives(self, *, tokens, dtype=None):
        return (Collective("a", "all-reduce", "forward", 600 * tokens), Collective("b", "all-reduce", "forward", 600 * tokens))


@pytest.fixture
def planned(monkeypatch):
    monkeypatch.setattr(autotp, "plan", lambda target, *, tp, check, **placements: FakePlan(), raising=False)


@pytest.mark.usefixtures("planned")
def test_plan_prints_a_table_and_the_traffic(run):
    code, out, _ = run("plan", "llama", "--tp", "2", "--tokens", "10")
    assert code == 0
    assert "the plan's table" in out
    assert "collectives for 10 tokens" in out
    assert "11.7 KiB" in out


@pytest.mark.usefixtures("planned")
def test_plan_as_json(run):
    code, out, _ = run("plan", "llama", "--tp", "2", "--json")
    assert code == 0
    assert json.loads(out) == {"tp": 2, "share": None}


@pytest.mark.usefixtures("planned")
def test_explain(run):
    assert run("explain", "llama", "layers.0.q", "--tp", "2") == (0, "why layers.0.q\n", "")
    code, _, err = run("explain", "llama", "nothing", "--tp", "2")
    assert (code, err) == (2, "error: no nothing here\n")


def test_byte_count():
    assert [byte_count(n) for n in (0, 1023, 1536, 3 << 20, 5 << 40)] == ["0 B", "1023 B", "1.5 KiB", "3.0 MiB", "5.0 TiB"]


def test_alike_collectives_are_counted():
    console = Console(width=80)
    with console.capture() as captured:
        console.print(collectives_table(FakePlan().collectives(tokens=1), 1))
    assert captured.get().split("\n")[2].split() == ["all-reduce", "forward", "2", "1.2", "KiB"]


@pytest.fixture
def folder(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 4096, **sizes}))
    return str(tmp_path)


def test_a_real_plan(run, folder):
    code, out, err = run("plan", folder, "--tp", "2")
    assert (code, err) == (0, "")
    assert "model.layers.0.self_attn.q_proj.weight" in out
    code, out, _ = run("plan", folder, "--tp", "2", "--json")
    assert json.loads(out)["params"]["model.layers.0.mlp.down_proj.weight"]["local_shape"] == [16, 16]


def test_a_real_explanation(run, folder):
    code, out, _ = run("explain", folder, "model.layers.0.self_attn", "--tp", "2")
    assert code == 0
    assert "sharded along dim 0" in out
    code, _, err = run("explain", folder, "model.layers.0.self_atn", "--tp", "2")
    assert code == 2
    assert "model.layers.0.self_attn" in err
    assert err.count("\n") == 1


def test_a_real_report(run, folder, tmp_path, monkeypatch):
    """Another tp and a recipe beside it; without jinja2 nothing is planned."""
    file = tmp_path / "page.html"
    (tmp_path / "own.yaml").write_text("extends: llama\n")
    options = ("--check", "graph", "--against", "4", "--against", str(tmp_path / "own.yaml"))
    code, out, err = run("report", folder, "--tp", "2", "-o", str(file), *options)
    assert (code, out) == (0, "") and err.startswith(f"wrote {file} (")
    text = file.read_text()
    assert "Against tp=4: LlamaForCausalLM over tp=4" in text and f"Against {tmp_path / 'own.yaml'}: " in text
    file.unlink()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    code, _, err = run("report", "no such target", "--tp", "2", "-o", str(file))
    assert code == 2 and "pip install 'autotp[report]'" in err and err.count("\n") == 1 and not file.exists()


def mlp():
    from torch import nn

    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


def mlp_inputs():
    import torch

    return {"input": torch.ones(2, 4)}


def test_a_plan_of_a_module_of_ones_own(run):
    code, out, err = run("plan", "tests.cli.test_commands:mlp", "--tp", "2", "--inputs", "tests.cli.test_commands:mlp_inputs")
    assert (code, err) == (0, "")
    assert "0.weight" in out


def test_inputs_that_cannot_be_used_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        "def boom():\n    raise ValueError('my own bug')\ndef several():\n    import torch\n    return [{'input': torch.ones(2, 4)}] * 2\n"
    )
    (tmp_path / "own_inputs.py").write_text(text + "def model():\n    import torch\n    return torch.nn.Linear(4, 4)\n")
    monkeypatch.chdir(tmp_path)
    assert commands.run(["plan", "own_inputs:model", "--tp", "2", "--inputs", "own_inputs:boom"]) == 2
    assert "inputs own_inputs:boom: making them failed with ValueError: my own bug" in capsys.readouterr().err
    assert commands.run(["plan", "own_inputs:model", "--tp", "2", "--inputs", "own_inputs:several", "--check", "graph"]) == 0
    assert commands.run(["verify", "own_inputs:model", "--tp", "2", "--inputs", "own_inputs:several"]) != 0
    told = capsys.readouterr()
    assert "verify compares one call" in told.err + told.out
