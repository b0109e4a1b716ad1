"""`import autotp` takes no time: what is heavy is imported where it is used."""

import json
import subprocess
import sys

import pytest

from tests.support.slow import swept

#: Each of them takes more than 20 ms, or brings one that does. torch itself is the user's.
HEAVY = (
    "transformers",
    "safetensors",
    "peft",
    "accelerate",
    "torchao",
    "sympy",
    "mpmath",
    "networkx",
    "pydantic",
    "yaml",
    "typer",
    "rich",
    "jinja2",
    "hypothesis",
    "pytest",
    "torch._dynamo",
    "torch._inductor",
    "torch._subclasses.fake_tensor",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "torch.fx.experimental.symbolic_shapes",
)


def fresh(code: str) -> list[str]:
    """Runs `code` in another Python, and returns what it puts into `found`."""
    program = f"import json, sys\n{code}\nprint(json.dumps(found))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout)
    return found


def test_nothing_heavy_is_imported():
    """Nothing beyond what `import torch` brings, torch itself left out as well."""
    code = f"import autotp\nfound = [m for m in {(*HEAVY, 'torch', 'numpy')!r} if m in sys.modules]"
    assert fresh(code) == []


@pytest.mark.parametrize("first", swept(["autotp.plan.layout", "autotp.api", "autotp.testing", "autotp.checkpoint"], "autotp.plan.layout"))
def test_names_are_functions_whatever_is_imported_first(first):
    """`autotp.plan` and `autotp.advise` are packages too; Python would bind those. And it is seen that the names are imported late."""
    code = (
        f"import {first}, autotp\n"
        "found = [type(autotp.plan).__name__, type(autotp.advise).__name__, autotp.checkpoint.__name__]\n"
        "found += [name for name in autotp.__all__ if not callable(getattr(autotp, name))]\n"
        "found += ['heavy'] * ('torch.distributed.tensor' in sys.modules)"
    )
    assert fresh(code) == ["function", "function", "autotp.checkpoint", "heavy"]


def test_an_unknown_name():
    code = "import autotp\nfound = []\ntry:\n    autotp.paralelize\nexcept AttributeError as error:\n    found.append(str(error))"
    assert fresh(code) == ["module 'autotp' has no attribute 'paralelize'"]
