"""Checkpoints that torchao quantized, and plain ones that are quantized while they are loaded, beside transformers on one device."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import autotp
from autotp.checkpoint import files, loading
from autotp.rewrite.parameters.quantized_form import is_quantized
from tests.quantization.models import LLAMA, apart, build, config, ids, inner, nbytes, states_differing
from tests.support.ranks import Pool, mesh

pytest.importorskip("torchao")

Auto: Any = transformers.AutoModelForCausalLM


def on_rank_0(work: Callable[[], Any]) -> None:
    """Runs `work` on rank 0, when no rank reads what it changes any more; all wait."""
    dist.barrier()
    if dist.get_rank() == 0:
        work()
    dist.barrier()


def written(kind: str, name: str, folder: str) -> tuple[Path, Path]:
    """Directories with the plain model, and with the one that transformers quantized by `name`, in several files."""
    plain, quantized = Path(folder) / "plain", Path(folder) / "quantized"

    def write() -> None:
        build(kind).save_pretrained(plain)  # type: ignore[operator]
        made = Auto.from_pretrained(plain, quantization_config=transformers.TorchAoConfig(config(name)))
        made.save_pretrained(quantized, max_shard_size="40KB")

    on_rank_0(write)
    return plain, quantized


def differing(alone: nn.Module, model: nn.Module) -> tuple[list[str], float, int]:
    """Names of the state that differ, the error of the logits, and how many weights are quantized."""
    state = autotp.full_state_dict(model)
    with torch.no_grad():
        error = apart(alone(ids()).logits, model(ids()).logits)
    return states_differing(alone.state_dict(), state), error, sum(map(is_quantized, state.values()))


def loaded(kind: str, name: str, folder: str) -> dict[str, Any]:
    """Every way from a checkpoint to a quantized parallel model."""
    plain, path = written(kind, name, folder)
    alone = Auto.from_pretrained(path)
    readers: list[files.Reader] = []

    class Counted(files.Reader):
        def __init__(self) -> None:
            super().__init__()
            readers.append(self)

    loading.Reader, kept = Counted, loading.Reader  # type: ignore[misc]
    try:
        model = autotp.from_pretrained(path, mesh())
    finally:
        loading.Reader = kept  # type: ignore[misc]
    asked = transformers.TorchAoConfig(config(name))
    found: dict[str, Any] = {
        "from_pretrained": differing(alone, model),
        "from_pretrained, quantized then": differing(alone, autotp.from_pretrained(plain, mesh(), quantization_config=asked)),
        "transformers, parallelize": differing(alone, autotp.parallelize(Auto.from_pretrained(path), mesh())),
        "transformers quantizes, parallelize": differing(
            alone, autotp.parallelize(Auto.from_pretrained(plain, quantization_config=asked), mesh())
        ),
    }
    marks = [
        (m.is_quantized, str(m.quantization_method), type(m.hf_quantizer), m.config.quantization_config.to_dict()) for m in (model, alone)
    ]
    share = nbytes(model) / nbytes(alone)
    return {"found": found, "read": sum(r.bytes for r in readers) / nbytes(model), "marks": marks[0] == marks[1], "share": share}


@pytest.mark.parametrize(
    ("kind", "name", "world"),
    [
        pytest.param("even", "int8", 2, marks=pytest.mark.sweep),
        ("concatenated", "int4 in groups", 2),
        ("padded", "int4 asymmetric", 3),
        pytest.param("shared", "fp8", 2, marks=pytest.mark.sweep),
        pytest.param("tied", "int8 in groups", 2, marks=pytest.mark.sweep),
        pytest.param("biased", "int4 rows dynamic", 2, marks=pytest.mark.slow),
    ],
)
def test_every_way(pool: Pool, tmp_path: Path, kind: str, name: str, world: int) -> None:
    for answer in pool.run(loaded, kind, name, str(tmp_path), world=world):
        for names, error, count in answer["found"].values():
            assert names == []
            assert error <= 1e-6
            assert count >= 8
        assert answer["marks"]
        assert answer["read"] <= 1.06  # a rank reads what it holds: of tied weights one twice, of groups cut inside both ends


def on_one_rank(folder: str) -> Any:
    plain, path = written("even", "int8", folder)
    asked = transformers.TorchAoConfig(config("int8"))
    alone = Auto.from_pretrained(path)
    return [
        differing(alone, autotp.from_pretrained(path, mesh())),
        differing(alone, autotp.from_pretrained(plain, mesh(), quantization_config=asked)),
    ]


def test_on_one_rank(pool: Pool, tmp_path: Path) -> None:
    for names, error, count in pool.run(on_one_rank, str(tmp_path), world=1)[0]:
        assert (names, error, count) == ([], 0.0, 14)


def by_name(folder: str) -> Any:
    from torchao.quantization import FqnToConfig

    plain, _ = written("even", "int8", folder)
    asked = transformers.TorchAoConfig(FqnToConfig({r"re:.*\.q_proj": config("int8"), "model.layers.1.mlp.up_proj": config("fp8")}))
    alone = Auto.from_pretrained(plain, quantization_config=asked)
    return differing(alone, autotp.from_pretrained(plain, mesh(), quantization_config=asked))


def test_modules_by_name(pool: Pool, tmp_path: Path) -> None:
    for names, error, count in pool.run(by_name, str(tmp_path)):
        assert names == [] and error <= 1e-6 and count == 3


def large(folder: str) -> Any:
    """A model that is judged by a smaller twin: no plain weights are made for its plan."""
    options = {**LLAMA, "hidden_size": 512, "intermediate_size": 1024, "vocab_size": 4000, "num_attention_heads": 8}
    path = Path(folder) / "large"

    def write() -> None:
        torch.manual_seed(0)
        Auto.from_config(transformers.LlamaConfig(**options)).save_pretrained(path)

    on_rank_0(write)
    model = Auto.from_pretrained(path, quantization_config=transformers.TorchAoConfig(config("int8")))
    autotp.parallelize(model, mesh())
    return autotp.plan_of(model).checked, float(autotp.plan_of(model).local_share)


def test_a_large_quantized_model_is_judged_by_a_twin(pool: Pool, tmp_path: Path) -> None:
    for checked, share in pool.run(large, str(tmp_path)):
        assert checked == "numbers of a smaller twin" and share < 0.52


def with_wrong_scales(folder: str) -> float:
    """The error where the scales of one weight in the files are other ones."""
    _, path = written("even", "int8", folder)
    alone = Auto.from_pretrained(path)

    def spoil() -> None:
        for file in path.glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                tensors, metadata = {k: opened.get_tensor(k) for k in opened.keys()}, opened.metadata()  # noqa: SIM118
            key = "model.layers.0.mlp.down_proj._weight_scale"
            if key in tensors:
                tensors[key] = tensors[key].roll(1, 0).contiguous()
                save_file(tensors, file, metadata)

    on_rank_0(spoil)
    return differing(alone, autotp.from_pretrained(path, mesh()))[1]


def test_other_scales_are_seen(pool: Pool, tmp_path: Path) -> None:
    assert min(pool.run(with_wrong_scales, str(tmp_path))) > 1e-4


def failure(work: Callable[[], Any]) -> str:
    """Class and text of the error that `work` raises."""
    try:
        work()
    except autotp.AutoTPError as error:
        dist.barrier()
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


METHODS = ("fp8", "bitsandbytes", "compressed-tensors", "gptq", "awq", "mxfp4", "hqq", "fbgemm_fp8")


def refused(folder: str) -> list[str]:
    """Checkpoints and arguments that cannot be followed."""
    from torchao.quantization import FqnToConfig

    plain, path = written("even", "int8", folder)
    text, weights = (plain / "config.json").read_text(), json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    found: list[str] = []
    for method in METHODS:
        changed = json.dumps(json.loads(text) | {"quantization_config": {"quant_method": method}})
        on_rank_0(lambda changed=changed: (plain / "config.json").write_text(changed))
        found.append(failure(lambda: autotp.from_pretrained(plain, mesh())))
    on_rank_0(lambda: (plain / "config.json").write_text(text))
    asked = transformers.TorchAoConfig(config("int8"))
    found.append(failure(lambda: autotp.from_pretrained(path, mesh(), quantization_config=asked)))
    found.append(failure(lambda: autotp.from_pretrained(plain, mesh(), quantization_config=transformers.FineGrainedFP8Config())))
    embeddings = transformers.TorchAoConfig(config("int8"), include_input_output_embeddings=True)
    found.append(failure(lambda: autotp.from_pretrained(plain, mesh(), quantization_config=embeddings)))
    found.append(failure(lambda: autotp.shard(path, Path(folder) / f"cut{dist.get_rank()}", tp=2)))
    embedded = Path(folder) / "embedded"
    by = FqnToConfig({"model.embed_tokens": config("int4 asymmetric"), "_default": config("int8")})
    wanted = transformers.TorchAoConfig(by, include_input_output_embeddings=True)
    on_rank_0(lambda: Auto.from_pretrained(plain, quantization_config=wanted).save_pretrained(embedded))
    found.append(failure(lambda: autotp.from_pretrained(embedded, mesh())))
    lost = path / weights["model.layers.0.mlp.down_proj._weight_scale"]

    def lose() -> None:
        with safe_open(lost, "pt") as opened:
            tensors = {k: opened.get_tensor(k) for k in opened.keys() if k != "model.layers.0.mlp.down_proj._weight_scale"}  # noqa: SIM118
            metadata = opened.metadata()
        save_file(tensors, lost, metadata)
        index = path / "model.safetensors.index.json"
        del weights["model.layers.0.mlp.down_proj._weight_scale"]
        index.write_text(json.dumps(json.loads(index.read_text()) | {"weight_map": weights}))

    on_rank_0(lose)
    found.append(failure(lambda: autotp.from_pretrained(path, mesh())))
    return found


def test_what_is_refused_is_named(pool: Pool, tmp_path: Path) -> None:
    first, second = pool.run(refused, str(tmp_path))
    assert [text.replace("cut1", "cut0") for text in second] == first
    for method, text in zip(METHODS, first, strict=False):
        assert f"the checkpoint is quantized ({method})" in text and "quantization_config=TorchAoConfig(…)" in text, text
    assert "FineGrainedFP8Config(dequantize=True)" in first[0]
    rest = [
        "InputError: quantization_config=: ",
        "InputError: quantization_config=: got FineGrainedFP8Config (fp8), and autotp quantizes by torchao alone",
        "InputError: quantization_config=: include_input_output_embeddings",
        "CheckpointError: ",
        "AutoTPError: model.embed_tokens.weight, of a Embedding, is quantized",
        "CheckpointError: ",
    ]
    for text, start in zip(first[len(METHODS) :], rest, strict=True):
        assert text.startswith(start), text
    assert "is not cut ahead: autotp.from_pretrained reads it by slices" in first[-3]
    assert "model.layers.0.mlp.down_proj.weight is quantized, and model.layers.0.mlp.down_proj._weight_scale is in no file" in first[-1]


def test_inner_tensors_have_names() -> None:
    from torchao.quantization import quantize_

    linear = nn.Linear(8, 8)
    quantize_(linear, config("int8"))
    assert set(inner(linear.weight)) == {"qdata", "scale", "zero_point"}
