"""Plans that are kept: equal to fresh ones, never used where anything they depend on differs, never used when damaged."""

from __future__ import annotations

import enum
import functools
import json
import logging
import re
import subprocess
import sys
import types
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autotp
from autotp import planning
from autotp.cache import store
from autotp.cache.kept import VARIABLE
from autotp.cache.key import Asked, key_of
from autotp.cache.walk import Unseen
from autotp.examine import Check
from autotp.plan.placements import AS_PLANNED, Placements
from autotp.recipe.recipe import Recipe
from tests.support import pooled
from tests.support.families import transformer
from tests.support.ranks import Pool


def double(x: Tensor) -> Tensor:
    return x * SCALE


SCALE = 2.0


class Mlp(nn.Module):
    factor = 1.0

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.register_buffer("mask", torch.ones(width))
        self.steps, self.options, self.shift = 1, {"names": ["x"]}, torch.zeros(width)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.steps):
            x = double(self.b(F.gelu(self.a(x))) * self.mask * self.factor) + self.shift
        return x


def mlp() -> Mlp:
    torch.manual_seed(0)
    return Mlp()


INPUTS = {"x": torch.zeros(2, 8)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "plans"))
    return tmp_path / "plans"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that were planned afresh."""
    found: list[nn.Module] = []
    fresh = planning.checked_plan

    def counting(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found.append(model)
        return fresh(model, *args, **kwargs)

    monkeypatch.setattr(planning, "checked_plan", counting)
    return found


def entry(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_a_kept_plan_is_the_plan(folder: Path, made: list[nn.Module], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "autotp.cache")
    first = autotp.plan(mlp(), tp=2, example_inputs=INPUTS)
    assert "the plan was kept" not in caplog.text
    assert autotp.plan(mlp(), tp=2, example_inputs=INPUTS) == first
    assert "the plan was kept in" in caplog.text
    assert len(made) == 1 and entry(folder).name.endswith(".plan.json")


@pytest.mark.parametrize("setting", ["0", ""])
def test_nothing_is_kept_where_it_is_off(setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: list[nn.Module]) -> None:
    monkeypatch.setenv(VARIABLE, setting)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        autotp.plan(mlp(), tp=2, example_inputs=INPUTS)
    assert len(made) == 2 and not list(tmp_path.iterdir())


def key(model: nn.Module, **more: Any) -> str:
    asked = {"tp": 2, "recipe": None, "inputs": INPUTS, "check": Check.NUMBERS, "placements": AS_PLANNED} | more
    return key_of(Asked(model, **asked)).digest  # type: ignore[arg-type]


def tied(m: Mlp) -> None:
    m.b.bias = nn.Parameter(m.shift)


def hooked(m: Mlp) -> None:
    m.a.register_forward_hook(lambda module, args, out: out)


def viewed(m: Mlp) -> None:
    m.a.weight = nn.Parameter(m.a.weight.detach().t().contiguous().t())


CHANGES: dict[str, Callable[[Mlp], Any]] = {
    "an int": lambda m: setattr(m, "steps", 2),
    "an item of a list": lambda m: m.options["names"].append("y"),
    "a new attribute": lambda m: setattr(m, "more", None),
    "a function": lambda m: setattr(m, "forward", types.MethodType(lambda self, x: x, m)),
    "training mode": lambda m: m.eval(),
    "training mode of a child": lambda m: m.a.eval(),
    "a weight": lambda m: m.a.weight.data.add_(1),
    "a buffer": lambda m: m.mask.zero_(),
    "a tensor": lambda m: m.shift.add_(1),
    "a dtype": lambda m: m.double(),
    "a shape": lambda m: setattr(m, "a", nn.Linear(8, 40)),
    "strides": viewed,
    "a class": lambda m: setattr(m, "a", nn.Bilinear(8, 8, 32)),
    "a missing bias": lambda m: setattr(m.a, "bias", None),
    "tied memory": tied,
    "a hook": hooked,
    "frozen": lambda m: m.a.weight.requires_grad_(False),
    "a name": lambda m: m.add_module("c", nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_has_another_key(change: str) -> None:
    model = mlp()
    assert key(mlp()) == key(model)  # equal models, two objects
    CHANGES[change](model)
    assert key(model) != key(mlp())


@pytest.mark.parametrize(
    "asked",
    [
        {"tp": 4},
        {"check": Check.GRAPH},
        {"placements": Placements(loss_parallel=True)},
        {"placements": Placements(sequence_parallel="auto")},
        {"inputs": {"x": torch.zeros(3, 8)}},
        {"inputs": {"x": torch.ones(2, 8)}},
        {"inputs": {"x": torch.zeros(2, 8).double()}},
        {"inputs": [INPUTS]},
        {"inputs": None},
        {"recipe": Recipe.load("llama")},
    ],
    ids=str,
)
def test_another_request_has_another_key(asked: dict[str, Any]) -> None:
    assert key(mlp(), **asked) != key(mlp())


def test_another_recipe_has_another_key() -> None:
    one, other = Recipe.load("llama"), Recipe.load("gpt2")
    assert key(mlp(), recipe=one) == key(mlp(), recipe=one) != key(mlp(), recipe=other)


def other_forward(self: Mlp, x: Tensor) -> Tensor:
    return self.b(F.gelu(self.a(x))) * self.mask


def other_double(x: Tensor) -> Tensor:
    return x + x


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (Mlp, "forward", other_forward),
        (Mlp, "factor", 2.0),
        (sys.modules[__name__], "double", other_double),
        (sys.modules[__name__], "SCALE", 3.0),
        (nn.Linear, "forward", lambda self, x: F.linear(x, self.weight)),
        (F, "gelu", other_double),
        (F, "gelu", F.normalize),
        (F, "gelu", functools.partial(torch.softmax, dim=-1)),
        (Tensor, "numel", lambda self: 0),
        (torch, "__version__", "0.0"),
    ],
    ids=lambda x: getattr(x, "__name__", str(x))[:20],
)
def test_other_code_has_another_key(owner: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(mlp())
    monkeypatch.setattr(owner, name, value)
    assert key(mlp()) != before
    monkeypatch.undo()
    assert key(mlp()) == before


def kind(number: int) -> Any:
    """An enum whose member says another number; its text is the same."""

    class Kind(enum.Enum):
        ONE = "one"

        def number(self) -> int:
            return number

    return Kind.ONE


def by_metaclass(number: int) -> Any:
    meta = type("Meta", (type,), {"number": number})
    return meta("Settings", (), {})


#: Of two objects that are alike at first sight, the attributes of two models.
ALIKE: dict[str, Callable[[int], Any]] = {
    "the method of an enum": kind,
    "the value of an enum": lambda n: enum.Enum("Kind", {"ONE": n}).ONE,  # type: ignore[misc]
    "a method of a dict": lambda n: {"a": n}.get,
    "a long pattern": lambda n: re.compile("a" * 300 + str(n)),
    "a namespace": lambda n: types.SimpleNamespace(numbers=np.full(2000, n)),
    "a deque": lambda n: deque([1], maxlen=n),
    "a class of another metaclass": by_metaclass,
    "a partial function of a method": lambda n: functools.partial("a,b".split, ",", n),
}


@pytest.mark.parametrize("name", ALIKE)
def test_what_looks_alike_has_another_key(name: str) -> None:
    def extended(number: int) -> nn.Module:
        model = mlp()
        model.extra = ALIKE[name](number)
        return model

    assert key(extended(1)) == key(extended(1)) != key(extended(2))


def test_a_mode_of_torch_is_not_in_any_key() -> None:
    with torch.device("meta"), pytest.raises(Unseen):
        key(mlp())


def test_settings_of_torch_are_in_the_key() -> None:
    before = key(mlp())
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    assert key(mlp()) != before
    hook.remove()
    assert key(mlp()) == before
    with torch.no_grad():
        assert key(mlp()) != before
    torch.set_default_dtype(torch.float64)
    try:
        assert key(mlp(), inputs=INPUTS) != before
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_edited_source_has_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the user that says something else at the next start, with the same names in it."""

    def start(number: str) -> str:
        text = "from torch import nn\nclass Net(nn.Module):\n    def forward(self, x):\n        return self.a(x) * {}\n"
        module = types.ModuleType("mine")
        module.__file__ = str(tmp_path / "mine.py")
        monkeypatch.setitem(sys.modules, "mine", module)
        exec(compile(text.format(number), module.__file__, "exec"), module.__dict__)
        model = module.Net()
        torch.manual_seed(0)
        model.a = nn.Linear(8, 8)
        return key(model)

    assert start("2") == start("2") != start("3")


def test_two_starts_have_one_key() -> None:
    """Also with texts hashed in another way: in no key is the order of a set."""
    program = "import torch; from tests.cache.test_cache import key, transformer; torch.manual_seed(0); print(key(transformer('llama')))"
    environment = {"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", VARIABLE: "0"}
    starts = [
        subprocess.Popen([sys.executable, "-c", program], env=environment | {"PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, text=True)
        for seed in ("1", "2")
    ]
    found = [start.communicate(timeout=170)[0].split()[-1] for start in starts]
    assert found[0] == found[1]


@pytest.mark.parametrize("change", ["hidden_act", "num_attention_heads", "nested"])
def test_a_config_is_in_the_key(change: str) -> None:
    torch.manual_seed(0)
    model = transformer("llama")
    before = key(model, inputs=None)
    assert key(model, inputs=None) == before
    if change == "nested":
        model.config.rope_parameters["rope_theta"] = 5.0
    else:
        setattr(model.config, change, {"hidden_act": "relu", "num_attention_heads": 2}[change])
    assert key(model, inputs=None) != before


def test_a_patched_library_has_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    torch.manual_seed(0)
    model = transformer("llama")
    before = key(model, inputs=None)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, *_: (q, k))
    assert key(model, inputs=None) != before


class Reads(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        with open("numbers") as file:  # noqa: PTH123
            return x * float(file.read())


@pytest.mark.parametrize("what", ["a file", "an iterator", "a generator", "a set of objects"])
def test_what_cannot_be_written_down_is_planned_afresh(what: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "autotp.cache")
    model: Any = Reads() if what == "a file" else mlp()
    held = {"an iterator": iter([1]), "a generator": (x for x in [1]), "a set of objects": {INPUTS["x"], model.shift}}
    model.held = held.get(what)
    with pytest.raises(Unseen):
        key(model)
    if what != "a file":
        autotp.plan(model, tp=2, example_inputs=INPUTS, check="graph")
        assert not folder.exists() and "no plan is kept: nothing says when" in caplog.text


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flipped(path: Path) -> None:
    text = path.read_text()
    at = text.index('"shape": [') + len('"shape": [')
    path.write_text(text[:at] + ("9" if text[at] != "9" else "8") + text[at + 1 :])


def signed(path: Path) -> None:
    """A layout is changed, and the digest made anew: the plan is of another model."""
    data = json.loads(path.read_text().replace("[32, 8]", "[32, 9]"))
    data["digest"] = store._digest({k: v for k, v in data.items() if k != "digest"})
    path.write_text(json.dumps(data))


def of_another(path: Path) -> None:
    data = json.loads(path.read_text())
    data["key"] = "0" * 64
    data["digest"] = store._digest({k: v for k, v in data.items() if k != "digest"})
    path.write_text(json.dumps(data))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def bytes_only(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize("damage", [truncated, flipped, signed, of_another, empty, bytes_only])
def test_a_damaged_entry_is_replaced(damage: Callable[[Path], None], folder: Path, made: list[nn.Module]) -> None:
    first = autotp.plan(mlp(), tp=2, example_inputs=INPUTS)
    whole = entry(folder).read_bytes()
    damage(entry(folder))
    assert entry(folder).read_bytes() != whole
    assert autotp.plan(mlp(), tp=2, example_inputs=INPUTS) == first
    assert len(made) == 2 and entry(folder).read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file" / "plans"))
    with pytest.warns(UserWarning, match="AUTOTP_CACHE"):
        plan = autotp.plan(mlp(), tp=2, example_inputs=INPUTS)
    assert plan.local_share < 1


def test_what_was_unused_longest_goes_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MOST_ENTRIES", 2)
    for tp in (2, 4, 8):
        autotp.plan(mlp(), tp=tp, example_inputs=INPUTS, check="graph")
    assert len(list(folder.iterdir())) == 2


def _compare(model_type: str, folder: str) -> tuple[float, list[str]]:
    """On one rank: a parallel model by a kept plan is equal to one device."""
    import os

    os.environ[VARIABLE] = folder
    try:
        found = pooled.compare(partial(transformer, model_type))
    finally:
        os.environ[VARIABLE] = "0"
    return found.local_share, sorted(found.failed)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "bert"])
def test_ranks_compute_with_a_kept_plan(model_type: str, pool: Pool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = pool.run(_compare, model_type, str(tmp_path))
    entries = {p.name: p.stat().st_ino for p in tmp_path.iterdir()}
    again = pool.run(_compare, model_type, str(tmp_path))
    assert first == again and entries and not first[0][1] and first[0][0] < 1
    assert {p.name: p.stat().st_ino for p in tmp_path.iterdir()} == entries  # none was written again


def _both(folder: str) -> str:
    import os

    os.environ[VARIABLE] = folder
    try:
        return str(autotp.plan(mlp(), tp=2, example_inputs=INPUTS).to_dict())
    finally:
        os.environ[VARIABLE] = "0"


def test_two_processes_keep_one_plan_at_once(pool: Pool, tmp_path: Path) -> None:
    one, other = pool.run(_both, str(tmp_path))
    assert one == other == pool.run(_both, str(tmp_path))[0]
    assert len(list(tmp_path.iterdir())) == 1
