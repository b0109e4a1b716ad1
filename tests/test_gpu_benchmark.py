"""benchmarks/gpu.py does all that it says on a CPU, with small sizes: the figures come where there is a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def ran(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=230)


@pytest.mark.programs
@pytest.mark.timeout(240)
def test_every_part_runs(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    done = ran("--device", "cpu", "--tiny", "--layers", "1", "--tokens", "16", "--rounds", "2", "--json", str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(file.read_text())
    assert set(found["speed"]) == {"tiny tp 2", "tiny tp 8"}
    for kinds in found["speed"].values():
        assert set(kinds) == {"prefill", "decode", "compiled decode", "decode in CUDA graphs"}
        assert all(r["ratio"] > 0 for r in kinds.values()), kinds
    for apart in found["equality"].values():
        assert apart["autotp"]["logits"] <= 1.5 * apart["one device"]["logits"] + 1e-5
    assert found["loading"]["ratio"] >= 1


@pytest.mark.programs
def test_without_a_gpu() -> None:
    done = ran()
    assert done.returncode == 0 and "not measured" in done.stderr and not done.stdout
