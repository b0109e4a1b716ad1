"""Digests depend on every value and its place, for every kind of tensor."""

from __future__ import annotations

import pytest
import torch

from autotp.digest import plain_text, tensor_digest

_N = 40_000  # more than a block


def _kinds() -> dict[str, torch.Tensor]:
    x = torch.randn(_N, generator=torch.Generator().manual_seed(0))
    small = x[:24].view(4, 6)
    return {
        "float": x,
        "double": x.double(),
        "bool": x > 0,
        "complex": torch.complex(x, -x),
        "float8": x.to(torch.float8_e4m3fn),
        "bytes": (x * 50).to(torch.uint8),
        "coo": small.relu().to_sparse(),
        "csr": small.relu().to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(small, 0.1, 3, torch.qint8),
        "expanded": x[:1000].expand(3, 1000),
        "scalar": torch.tensor(3.0),
    }


@pytest.mark.parametrize("name", ["float", "double", "bool", "complex", "float8", "bytes", "coo", "csr", "quantized", "expanded", "scalar"])
@pytest.mark.filterwarnings("ignore")
def test_one_other_value_is_another_digest(name: str) -> None:
    assert tensor_digest(_kinds()[name]) == tensor_digest(_kinds()[name])
    t = _kinds()[name]
    if t.layout is torch.sparse_csr:
        other = torch.sparse_csr_tensor(t.crow_indices(), t.col_indices(), t.values() * 2, t.shape)
    elif t.is_sparse:
        other = t * 2
    elif t.is_quantized:
        other = torch.quantize_per_tensor(t.dequantize(), 0.1, 4, torch.qint8)
    else:
        other = t.clone()
        flat = other.reshape(-1) if t.dtype is not torch.float8_e4m3fn else other.view(torch.uint8)
        flat[-1] = flat[-1] == 0
    assert tensor_digest(other) != tensor_digest(t)


@pytest.mark.filterwarnings("ignore")
def test_places_signs_and_constants_count() -> None:
    x = _kinds()["double"]
    signs = x.clone()
    signs[[3, 30_000]] *= -1
    for other in (x.flip(0), x.roll(1), x[torch.randperm(_N)], signs, x.view(2, -1)):
        assert tensor_digest(other) != tensor_digest(x)
    assert len({tensor_digest(torch.full((64,), float(i))) for i in range(50)}) == 50
    assert tensor_digest(torch.ones(3, device="meta")) != tensor_digest(torch.ones(4, device="meta"))


def test_plain_values() -> None:
    class Config:
        def __init__(self, **values) -> None:
            self.__dict__.update(values)

    same = [(1e-5, 1e-5), ([1, (2, "a")], [1, (2, "a")]), (Config(a=1, _b=2), Config(a=1, _b=3)), (torch.relu, torch.relu)]
    assert all(plain_text(a) == plain_text(b) is not None for a, b in same)
    other = [(1e-5, 1e-6), (True, 1), ([1], (1,)), (Config(a=1), Config(a=2)), (torch.relu, torch.tanh), ({"a": 1}, {"a": 2}), (None, 0)]
    assert all(plain_text(a) != plain_text(b) for a, b in other)
    assert plain_text(torch.device("cpu")) is None and plain_text("cuda:1") is None
