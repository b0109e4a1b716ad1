"""The recipes are what `tools/export_recipes.py` writes, and read as YAML they say what the plan says."""

from __future__ import annotations

import pytest
import yaml

from tools import export_recipes

FOLDER = export_recipes.ROOT / "recipes"


@pytest.mark.parametrize("name", export_recipes.RECIPES)
def test_file_is_what_the_tool_writes(name: str) -> None:
    found = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert found == export_recipes.text(name), "run `python tools/export_recipes.py`"


def test_every_file_has_its_test() -> None:
    assert {file.stem for file in FOLDER.glob("*.yaml")} == set(export_recipes.RECIPES)


def test_fused_weight_and_whole_parameters() -> None:
    read = yaml.safe_load((FOLDER / "gpt2.yaml").read_text(encoding="utf-8"))
    fused = read["parameters"]["transformer.h.*.attn.c_attn.weight"]
    assert fused["shape"] == [768, 2304]
    assert fused["sharded"] == {"dim": 1, "factor": "h", "pattern": "attention"}
    assert fused["layout"].count("h*") == 3
    assert fused["sizes"]["h"] == 12
    for param in read["parameters"].values():
        assert ("whole" in param) != ("sharded" in param)
        assert param.get("whole", "reason")
    assert read["tied"] == {"lm_head.weight": "transformer.wte.weight"}


def test_names_that_fold_to_one_must_agree() -> None:
    assert export_recipes.folded({"h.0.w": 1, "h.1.w": 1, "conv1.w": 2}) == {"h.*.w": 1, "conv1.w": 2}
    with pytest.raises(ValueError, match=r"h\.1\.w"):
        export_recipes.folded({"h.0.w": 1, "h.1.w": 2})
