"""The JSON schema is what the models of recipe files make, and says of bundled recipes what they say of themselves."""

from __future__ import annotations

import json

from autotp.recipe import bundled
from autotp.recipe.schema import RecipeFile, json_schema
from autotp.recipe.spec import Role


def test_file_is_what_the_models_make():
    found = (bundled.folder() / "recipe.schema.json").read_text(encoding="utf-8")
    assert found == json_schema(), "run `autotp recipe schema > recipes/recipe.schema.json`"


def test_every_key_is_described():
    schema = json.loads(json_schema())
    assert set(schema["properties"]) == set(RecipeFile.model_fields)
    assert all(p.get("description") for p in schema["properties"].values())
    assert not schema["additionalProperties"]
    assert {role.value for role in Role} < set(schema["properties"])
