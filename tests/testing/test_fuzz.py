"""The fuzzer: what it prints, and that a failure becomes a script that fails by itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import settings

from autotp.testing import NotEquivalent, fuzz
from autotp.testing.architectures.architecture import Architecture
from autotp.testing.architectures.spec import Position, Trap
from autotp.testing.tiny.models import tiny_config
from tests.support.rules import give_rule


def test_a_quiet_run_reports_what_it_covered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "_SETTINGS", settings(fuzz._SETTINGS, max_examples=2))
    done = fuzz.fuzz(0.02, tmp_path / "out", seed=3)
    text = done.report()
    assert "examples were equal" in text and "projection: " in text and "tp: " in text and text.endswith("0 failed")
    assert not (tmp_path / "out").exists()


def always_this(monkeypatch: pytest.MonkeyPatch, a: Architecture) -> None:
    """The strategy draws one architecture, at two ranks."""
    from hypothesis import strategies as st

    monkeypatch.setattr(fuzz, "architectures", lambda: st.just(a))
    monkeypatch.setattr(fuzz, "degrees", lambda: st.just(2))
    monkeypatch.setattr(fuzz, "_SETTINGS", settings(fuzz._SETTINGS, max_examples=1))


def test_a_failure_is_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always_this(monkeypatch, Architecture(kv=4, group=1, width=16, trap=Trap.WIDTH_FLIP, hidden=7, position=Position.NONE))
    said: list[str] = []
    with monkeypatch.context() as fault:
        give_rule(fault, "flip")
        done = fuzz.fuzz(0.02, tmp_path, family="architectures", write=said.append, certificate="graph")
        (name,) = done.failures
        script = (tmp_path / name).read_text(encoding="utf-8")
        with pytest.raises(NotEquivalent):
            exec(script, {})
    exec(script, {})  # without the fault nothing is wrong
    assert "FAILED" in said[0] and name in done.report() and done.report().endswith(str(tmp_path / name))
    assert "class Model(nn.Module)" in script and "# NotEquivalent" in script and "h = h.flip(-1)" in script


def test_a_config_is_a_script(tmp_path: Path) -> None:
    config = tiny_config("llama", num_attention_heads=6, num_key_value_heads=3, hidden_size=48, head_dim=8, tie_word_embeddings=True)
    text = fuzz.script_of_config(config, 3)
    space: dict[str, object] = {}
    exec(text.replace("assert_equivalent(config, tp=3, steps=2, certificate='numbers')", ""), space)
    assert "assert_equivalent(config, tp=3, steps=2, certificate='numbers')" in text
    assert space["config"].to_diff_dict() == config.to_diff_dict()  # type: ignore[attr-defined]


@pytest.mark.parametrize("words", [["--minutes", "x"], ["--family", "everything"]])
def test_bad_arguments(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["fuzz", *words])
    with pytest.raises(SystemExit, match="2"):
        fuzz.main()
    assert "usage: python -m autotp.testing.fuzz" in capsys.readouterr().err
