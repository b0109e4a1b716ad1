"""A calibrated table: what is written is read again, fits are right, ranks and backends that are not there are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import autotp
from autotp.advise.calibrate import Rates, calibrate, fitted, written
from autotp.advise.hardware import gpu, link
from autotp.advise.workload import Serve
from autotp.cli import commands
from autotp.errors import InputError


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_latency_and_bandwidth_are_recovered(ranks: int) -> None:
    share = 2 * (ranks - 1) / ranks
    sums = {2**n: 2e-4 + share * 2**n / 3e9 for n in range(10, 25, 2)}
    assert fitted(sums, ranks) == (pytest.approx(2e-4, rel=1e-3), pytest.approx(3e9, rel=1e-3))
    falling = {1024: 2e-4, 2**20: 1e-4}  # disturbed: no such line has a latency and a bandwidth
    alpha, bandwidth = fitted(falling, ranks)
    assert alpha > 0 and bandwidth > 0


def test_the_table_takes_the_slowest_ranks_sums(tmp_path: Path) -> None:
    ranks = [Rates("CPU", 1e9 * (r + 1), 1e11, 1e10, 0.6, 1e-5, ((1024, 1e-4 * (r + 1)), (2**20, 1e-3))) for r in range(2)]
    file = tmp_path / "here.yaml"
    file.write_text(written(ranks, "gloo", "float32"))
    here, table = gpu(str(file))
    assert (here.memory, here.flops, here.bandwidth, here.launch, here.serial) == (1e9, {"float32": 1e11}, 1e10, 1e-5, True)
    assert here.seconds(2000, 6 * 10**9, torch.float32) == pytest.approx(1 + 1e-5)  # a product of one row
    assert here.seconds(0, 6 * 10**9, torch.float32) == pytest.approx(0.6 + 1e-5)
    found = link("gloo", table)
    assert found.seconds(2, 1024, 2) == pytest.approx(2e-4, rel=0.1)
    assert found.most == 2


@pytest.mark.sweep
def test_this_machine_can_be_calibrated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "here.yaml"
    assert commands.run(["calibrate", "-o", str(file), "--timeout", "120"]) == 0
    assert capsys.readouterr().out == file.read_text()
    from transformers import LlamaConfig

    small = LlamaConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_hidden_layers=2, vocab_size=128)
    advice = autotp.advise(small, Serve(prompt=8, new_tokens=2, dtype="float32"), gpus=2, gpu=str(file), link=str(file))
    assert advice.machine.link.name == "gloo"
    assert 1e-4 < advice.options[0].seconds < 1  # two layers on a CPU
    assert advice.best is not None and advice.best.tp == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 1}, "ranks is 1, wanted a whole number of at least 2"),
        ({"backend": "mpi"}, "backend is 'mpi', wanted 'gloo'"),
        ({"dtype": "int4"}, "dtype is 'int4'"),
        ({"backend": "nccl", "ranks": 4096}, "needs a GPU for each of 4096 ranks"),
        ({"timeout": 0}, "timeout is 0"),
    ],
)
def test_what_cannot_be_measured(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        calibrate(**options)
    assert commands.run(["calibrate", "-o", "no/such/folder/here.yaml"]) == 2
