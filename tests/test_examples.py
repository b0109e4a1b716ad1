"""The example programs run as a user runs them, for a few steps, and give the same on one and two ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
TORCHRUN = (BIN / "torchrun", "--standalone", "--nproc-per-node")
ACCELERATE = (BIN / "accelerate", "launch", "--multi-gpu", "--num-machines", "1", "--mixed-precision", "no", "--dynamo-backend", "no")

pytestmark = pytest.mark.timeout(240)


def run(*command, timeout=100, **variables):
    """Output lines of a program; the whole process group ends with it, whatever happens."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    assert process.returncode == 0, f"{out}\n{err}"
    return out.splitlines()


def test_generate_gives_the_tokens_of_one_rank():
    one, two = run(*TORCHRUN, 2, "examples/generate.py", "--tokens", "6")
    assert one.startswith("one rank:")
    assert two.startswith("2 ranks:")
    assert one.partition(":")[2].split() == two.partition(":")[2].split()
    assert one.count(",") == 5


@pytest.fixture(scope="module")
def on_one_rank():
    return run(*TORCHRUN, 1, "examples/train.py", "--steps", "3")


def test_train_on_two_ranks_is_train_on_one(on_one_rank):
    assert on_one_rank[0].startswith("step   0  loss ")
    assert run(*TORCHRUN, 2, "examples/train.py", "--steps", "3") == on_one_rank


def test_train_under_accelerate_is_the_same(on_one_rank):
    launch = (*ACCELERATE, "--num-processes", 2, "--main-process-port", 0)
    assert run(*launch, "examples/train.py", "--steps", "3", "--accelerate", ACCELERATE_USE_CPU="1") == on_one_rank
