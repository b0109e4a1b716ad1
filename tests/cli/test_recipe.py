"""`autotp recipe`: what it prints, writes and exits with."""

from __future__ import annotations

import json

import pytest

import autotp
from autotp.cli import commands
from autotp.recipe import bundled

TINY = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 64,
    "n_positions": 32,
}


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = commands.run([str(a) for a in arguments])
        captured = capsys.readouterr()
        own = [line for line in captured.err.splitlines(keepends=True) if not line.startswith("[transformers]")]
        return code, captured.out, "".join(own)

    return call


@pytest.fixture
def target(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


@pytest.mark.sweep
def test_init_check_and_a_mistake(run, target):
    file = target / "mine.yaml"
    code, out, err = run("recipe", "init", target, "-o", file)
    assert (code, out) == (0, "")
    assert err == f"wrote {file}\n"
    text = file.read_text()
    assert text.startswith("# GPT2LMHeadModel, as autotp plans it over 2 ranks.")
    assert '  "transformer.h.*.attn.c_attn.weight": "e (h d | h d | h d2)"' in text
    assert "# a lookup table this short costs more to reduce than it saves" in text
    code, out, err = run("recipe", "check", file, target, "--tp", 2)
    assert code == 0, err
    assert err == ""
    assert "ok    gradients" in out
    file.write_text(text.replace('c_attn.weight": "e (h d | h d | h d2)"', 'c_attn.weight": "e (h 3 d)"'))
    code, out, err = run("recipe", "check", file, target, "--tp", 2)
    assert (code, out) == (1, "")
    line = next(i for i, t in enumerate(file.read_text().splitlines(), 1) if "c_attn.bias" in t)
    assert err.startswith(f"error: {file}:{line}:")


def test_init_keeps_what_is_there(run, target):
    file = target / "mine.yaml"
    file.write_text("# mine\n")
    code, _, err = run("recipe", "init", target, "-o", file)
    assert code == 2
    assert "exists; --force writes over it" in err
    assert file.read_text() == "# mine\n"
    assert run("recipe", "init", target, "-o", file, "--force")[0] == 0
    code, out, _ = run("recipe", "init", target)
    assert (code, out) == (0, file.read_text())


@pytest.mark.sweep
def test_check_follows_numbers(run, target, tmp_path):
    """What passes every check but computes other numbers fails by the numbers."""
    recipe = bundled.folder() / "gpt2.yaml"
    file = tmp_path / "wrong.yaml"
    text = (
        recipe.read_text().replace("shard: [h, i, v]", "unsafe: true\nreason: a test\nshard: [d, i, v]").replace('"_ h _ _"', '"_ d _ _"')
    )
    file.write_text(text.replace('attn.c_attn.nf: "(h d | h d | h d)"', 'attn.c_attn.nf: "(h d | h d | h d)"\n  attn.num_heads?: whole'))
    code, out, err = run("recipe", "check", file, target, "--tp", 2)
    assert code == 1
    assert "UNSAFE" in out
    assert "FAIL" in err.upper()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere.yaml", "gpt2"), "nowhere.yaml: no such recipe file"),
        (("gpt", "gpt2"), "no recipe 'gpt': near it:"),
        (("gpt2", "gtp2"), "near names: gpt2"),
        (("llama", "gpt2"), "no parameter of GPT2LMHeadModel is called"),
    ],
)
def test_check_of_nothing(run, arguments, message):
    code, out, err = run("recipe", "check", *arguments, "--tp", 2)
    assert (code, out) == (1, "")
    assert all(line.startswith("error: ") for line in err.splitlines())
    assert message in err


def test_diff(run):
    code, out, _ = run("recipe", "diff", "llama", "llama")
    assert (code, out) == (0, "no difference\n")
    code, out, _ = run("recipe", "diff", "llama", "phi3")
    assert code == 0
    lines = out.splitlines()
    assert '- self_attn.q_proj.weight: column "(kv group d) e"' in lines
    assert '+ self_attn.qkv_proj.weight: column "(kv group d | kv d | kv d) e"' in lines
    assert run("recipe", "diff", "llama", "phi3", "--exit-code")[0] == 1
    assert run("recipe", "diff", "llama", "nowhere.yaml")[0] == 2


def test_show(run):
    code, out, _ = run("recipe", "show")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(bundled.names())
    code, out, _ = run("recipe", "show", "qwen3")  # a model type of llama.yaml
    assert (code, autotp.Recipe.loads(out)) == (0, autotp.Recipe.load("llama"))
    assert out.startswith("# Llama and the many decoders")
    code, out, _ = run("recipe", "show", "phi3")
    assert "mlp.down_proj.weight" in out  # inherited


def test_schema(run):
    code, out, _ = run("recipe", "schema")
    assert code == 0
    assert json.loads(out)["title"] == "autotp recipe"


def test_plan_and_explain_take_a_recipe(run, target):
    code, out, _ = run("plan", target, "--tp", 2, "--recipe", "gpt2")
    assert code == 0
    assert "e (h* d | h* d | h* d)" in out
    code, out, _ = run("explain", target, "transformer.h.0.attn.c_attn.weight", "--tp", 2, "--recipe", "gpt2")
    assert (code, "e (h* d | h* d | h* d)" in out) == (0, True)
    code, _, err = run("plan", target, "--tp", 2, "--recipe", "llama")
    assert code == 2
    assert err.count("\n") > 1
    assert all(line.startswith("error: llama.yaml:") for line in err.splitlines())
