"""`from_pretrained`: what a rank reads, what it takes from its arguments, and that every rank hears of what goes wrong on one."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

import autotp
from autotp.checkpoint import files, loading
from tests.support.families import transformer, transformer_inputs
from tests.support.lifecycle import differing, write
from tests.support.ranks import mesh


def saved(folder: str, model_type: str = "llama", dtype: torch.dtype = torch.float32, **overrides: Any) -> tuple[Any, Path]:
    """A tiny model and the directory with it."""
    model = transformer(model_type, **overrides).to(dtype)
    path = Path(folder) / "model"
    write(model, path, "200KB")
    return model, path


def failure(work) -> str:
    """Class and text of the error that `work` raises; all ranks must be in step afterwards."""
    try:
        work()
    except autotp.AutoTPError as error:
        dist.barrier()
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


# ------------------------------------------------------------------------------------------------------------ what is read


def bytes_read(folder: str, model_type: str, overrides: dict[str, Any]) -> list[float]:
    """Bytes that this rank copied out of the files ÷ bytes of its parameters; and the largest difference of the outputs."""
    experts = {"experts": "eager"} if model_type in ("mixtral", "deepseek_v3") else {}  # the grouped product has no float64
    model, path = saved(folder, model_type, torch.float64, **overrides, **experts)
    readers: list[files.Reader] = []

    class Counted(files.Reader):
        def __init__(self) -> None:
            super().__init__()
            readers.append(self)

    loading.Reader, kept = Counted, loading.Reader  # type: ignore[misc]
    try:
        loaded = autotp.from_pretrained(path, mesh(), model_class=type(model), **({"experts_implementation": "eager"} if experts else {}))
    finally:
        loading.Reader = kept  # type: ignore[misc]
    held = sum(p._local_tensor.nbytes for p in loaded.parameters() if isinstance(p, DTensor))
    inputs = transformer_inputs(model)
    with torch.no_grad():
        whole, parallel = model(**inputs), loaded(**inputs)
    (wanted, got) = (next(t for t in out.values() if isinstance(t, torch.Tensor) and t.is_floating_point()) for out in (whole, parallel))
    return [sum(r.bytes for r in readers) / held, float((wanted - got).abs().max() / wanted.abs().max())]


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("llama", {}),
        pytest.param("gpt2", {}, marks=pytest.mark.slow),
        pytest.param("phi3", {}, marks=pytest.mark.slow),
        pytest.param("bloom", {}, marks=pytest.mark.slow),
        pytest.param("mixtral", {}, marks=pytest.mark.slow),
        pytest.param("deepseek_v3", {}, marks=pytest.mark.sweep),
        pytest.param("t5", {}, marks=pytest.mark.slow),
        ("llama", {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 31}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())) or "as it is",
)
def test_a_rank_reads_its_shards_and_the_model_is_the_same(pool, tmp_path, model_type, overrides):
    for ratio, error in pool.run(bytes_read, str(tmp_path), model_type, overrides):
        assert ratio <= 1.05
        assert error < 1e-9


# ------------------------------------------------------------------------------------------------------------ arguments


def arguments(folder: str) -> list[Any]:
    model, path = saved(folder, "llama", torch.bfloat16)
    cls, plain = type(model), type(model).from_pretrained(path)
    out: list[Any] = []
    for dtype in (None, "auto", torch.float64, "float16"):
        made = autotp.from_pretrained(path, mesh(), dtype=dtype)
        wanted = cls.from_pretrained(path, dtype="auto" if dtype is None else dtype)
        out += differing(autotp.full_state_dict(made), wanted.state_dict())
        out += [made.dtype] if made.dtype != wanted.dtype or made.config.dtype != wanted.config.dtype else []
    plan = autotp.plan(path, tp=2)
    assert autotp.plan_of(autotp.from_pretrained(str(path), mesh(), plan=plan)) == plan
    follows = autotp.from_pretrained(path, mesh(), recipe="llama")
    out += differing(autotp.full_state_dict(follows), plain.state_dict())
    eager = autotp.from_pretrained(path, mesh(), attn_implementation="eager", rms_norm_eps=0.125)
    out += [] if (eager.config._attn_implementation, eager.model.norm.variance_epsilon) == ("eager", 0.125) else ["attn_implementation"]
    base = autotp.from_pretrained(path, mesh(), model_class=type(plain.model))
    out += differing(autotp.full_state_dict(base), plain.model.state_dict())
    out += [] if not base.training else ["training"]
    return out


@pytest.mark.sweep
def test_arguments_are_taken_as_transformers_takes_them(pool, tmp_path):
    assert pool.run(arguments, str(tmp_path)) == [[], []]


def missing_and_unexpected(folder: str) -> tuple[list[str], list[str], list[float]]:
    """What is logged with autotp and with transformers, and the sum of the weights that no file holds."""
    import transformers

    _, path = saved(folder)
    said: list[str] = []

    class Listen(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger = logging.getLogger("transformers.modeling_utils")
    listen = Listen()
    logger.addHandler(listen)
    transformers.logging.set_verbosity_warning()
    try:
        auto = transformers.AutoModelForSequenceClassification
        torch.manual_seed(dist.get_rank())  # ranks that are not seeded alike
        made = autotp.from_pretrained(path, mesh(), model_class=auto, num_labels=3, pad_token_id=0)
        ours = said.copy()
        said.clear()
        torch.manual_seed(0)
        plain = auto.from_pretrained(path, num_labels=3, pad_token_id=0)
    finally:
        logger.removeHandler(listen)
        transformers.logging.set_verbosity_error()
    score = autotp.full_state_dict(made)["score.weight"]
    return ours, said, [float(score.sum()), float(plain.score.weight.sum())]


def test_missing_and_unexpected_keys_are_reported_once_as_transformers_reports_them(pool, tmp_path):
    (first, theirs, sums), (second, _, others) = pool.run(missing_and_unexpected, str(tmp_path))
    assert second == []
    assert [_without_path(t) for t in first] == [_without_path(t) for t in theirs]
    assert "score.weight" in first[0] and "lm_head.weight" in first[0]
    assert sums[0] == others[0] == sums[1]  # rank 0's random state, as on one device


def _without_path(text: str) -> str:
    return "\n".join(line.partition(" from: ")[0] for line in text.splitlines())


def generation(folder: str) -> list[Any]:
    _, path = saved(folder)
    if dist.get_rank() == 0:
        config = json.loads((path / "generation_config.json").read_text())
        (path / "generation_config.json").write_text(json.dumps(config | {"temperature": 0.25, "do_sample": True, "max_new_tokens": 5}))
    dist.barrier()
    made = autotp.from_pretrained(path, mesh())
    return [made.generation_config.temperature, made.generate(torch.tensor([[1, 2, 3]])).shape[1]]


def test_the_generation_config_is_the_files(pool, tmp_path):
    assert pool.run(generation, str(tmp_path)) == [[0.25, 8], [0.25, 8]]


# ------------------------------------------------------------------------------------------------------------ errors


def bad_arguments(folder: str) -> list[str]:
    model, path = saved(folder)
    plan = autotp.plan(path, tp=4)
    two = autotp.plan(path, tp=2)
    given: list[tuple[Any, dict[str, Any]]] = [
        (7, {}),
        (path, {"dtype": 3}),
        (path, {"dtype": "float33"}),
        (path, {"plan": "llama"}),
        (path, {"plan": plan}),
        (path, {"plan": two, "recipe": "llama"}),
        (path, {"model_class": "LlamaForCausalLM"}),
        (path, {"model_class": _auto("AutoModelForSeq2SeqLM")}),
        (path, {"num_hiden_layers": 1}),
        (path, {"device_map": "auto"}),
        (path / "config.json", {}),
        (path / "nowhere", {}),
        ("no/such", {}),
        (path, {"hidden_size": 2 * model.config.hidden_size}),
        (path, {"quantization_config": {"quant_method": "fp8"}}),
    ]
    found = [failure(lambda p=p, kw=kw: autotp.from_pretrained(p, mesh(), **kw)) for p, kw in given]
    found.append(failure(lambda: autotp.from_pretrained(path, "cuda")))  # type: ignore[arg-type]
    return found


def _auto(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def test_wrong_arguments_name_the_argument_and_what_to_do(pool, tmp_path):
    first, second = pool.run(bad_arguments, str(tmp_path))
    assert first == second
    wanted = [
        "InputError: path: got int",
        "InputError: dtype: got int",
        "InputError: dtype='float33': torch has no such dtype",
        "InputError: plan: got str, wanted an autotp.Plan",
        "PlanError: the plan is for tp 4, the mesh has 2 ranks",
        "InputError: plan= and recipe= both say",
        "InputError: model_class='LlamaForCausalLM': wanted a model class",
        "InputError: model_class=AutoModelForSeq2SeqLM: it has no model for llama",
        "InputError: num_hiden_layers=1: LlamaConfig has no such value; near names: num_hidden_layers",
        "InputError: device_map=: autotp.from_pretrained has no such argument",
        "CheckpointError: ",
        "CheckpointError: ",
        "CheckpointError: no/such: no such directory, and not a model that can be downloaded",
        "CheckpointError: ",
        "InputError: quantization_config=: got dict (fp8), and autotp quantizes by torchao alone",
        "MeshError: mesh must be a torch DeviceMesh",
    ]
    for got, start in zip(first, wanted, strict=True):
        assert got.startswith(start), got
    assert "config.json: a file, wanted the directory" in first[10]
    assert "nowhere: no such directory" in first[11]
    assert "MISMATCH" in first[13] and "torch.Size" in first[13]


def broken_files(folder: str) -> list[str]:
    model, path = saved(folder)
    found: list[str] = []
    names = sorted(p.name for p in path.glob("*.safetensors"))

    def broken(change, back) -> None:
        if dist.get_rank() == 0:
            change()
        dist.barrier()
        found.append(failure(lambda: autotp.from_pretrained(path, mesh())))
        if dist.get_rank() == 0:
            back()
        dist.barrier()

    file = path / names[1]
    whole, config = file.read_bytes(), (path / "config.json").read_text()
    tensors = load_file(file)
    dist.barrier()
    broken(lambda: file.write_bytes(whole[:-100]), lambda: file.write_bytes(whole))
    broken(lambda: file.write_bytes(b"\0" * 100), lambda: file.write_bytes(whole))
    broken(file.unlink, lambda: file.write_bytes(whole))
    broken(lambda: (path / "config.json").write_text("{"), lambda: (path / "config.json").write_text(config))
    quantized = json.dumps(json.loads(config) | {"quantization_config": {"quant_method": "fp8"}})
    broken(lambda: (path / "config.json").write_text(quantized), lambda: (path / "config.json").write_text(config))
    broken((path / "config.json").unlink, lambda: (path / "config.json").write_text(config))
    key = next(k for k, t in tensors.items() if t.ndim == 2)
    narrow = tensors | {key: tensors[key][:, :-1].contiguous()}
    broken(lambda: save_file(narrow, file, {"format": "pt"}), lambda: file.write_bytes(whole))
    assert not differing(autotp.full_state_dict(autotp.from_pretrained(path, mesh())), model.state_dict())
    return found


def test_broken_files_are_an_error_on_every_rank(pool, tmp_path):
    first, second = pool.run(broken_files, str(tmp_path))
    assert first == second
    wanted = ["not a whole safetensors file", "not a whole", "are missing", "transformers rejects it"]
    wanted += ["is quantized (fp8)", "no config.json", "MISMATCH"]
    for got, part in zip(first, wanted, strict=True):
        assert got.startswith("CheckpointError: ") and part in got, got


def fails_on_one(folder: str, where: str) -> str:
    """Rank 1 cannot read: its file system fails when a header, or when entries are read."""
    _, path = saved(folder)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(5, "Input/output error")

    opened, part = files.open_file, files.Reader.__call__
    if dist.get_rank() == 1:
        if where == "header":
            files.open_file = fail  # type: ignore[assignment]
        else:
            files.Reader.__call__ = fail  # type: ignore[method-assign,assignment]
    try:
        return failure(lambda: autotp.from_pretrained(path, mesh()))
    finally:
        files.open_file = opened
        files.Reader.__call__ = part  # type: ignore[method-assign]


@pytest.mark.parametrize("where", ["header", "entries"])
def test_a_rank_that_cannot_read_fails_all(pool, tmp_path, where):
    first, second = pool.run(fails_on_one, str(tmp_path), where)
    assert first == second and "rank 1 failed with OSError: [Errno 5] Input/output error" in first


def untraceable(folder: str) -> str:
    """A type that needs inputs which cannot be made up."""
    model, path = saved(folder, "molmo2_adapter")
    return failure(lambda: autotp.from_pretrained(path, mesh(), model_class=type(model)))


def test_a_model_that_needs_inputs_names_the_way_out(pool, tmp_path):
    first, second = pool.run(untraceable, str(tmp_path))
    assert first == second and "from_pretrained takes plan=autotp.plan(path, tp=2, example_inputs=" in first
