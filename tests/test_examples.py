"""The example programs run as a user runs them, for a few steps, and give the same on one and two ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
TORCHRUN = (BIN / "torchrun", "--standalone", "--nproc-per-node")
ACCELERATE = (BIN / "accelerate", "launch", "--multi-gpu", "--num-machines", "1", "--mixed-precision", "no", "--dynamo-backend", "no")

pytestmark = [pytest.mark.timeout(240), pytest.mark.programs]


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


@pytest.mark.slow  # fine-tuning does the same under accelerate
def test_train_under_accelerate_is_the_same(on_one_rank):
    launch = (*ACCELERATE, "--num-processes", 2, "--main-process-port", 0)
    assert run(*launch, "examples/train.py", "--steps", "3", "--accelerate", ACCELERATE_USE_CPU="1") == on_one_rank


FINETUNE = ("examples/finetune.py", "--lr", "5e-3", "--model")
STORIES = ROOT.parent / "shared" / "models" / "stories15m"


def losses(lines):
    """{step: loss} of the lines that a training program printed."""
    return {int(words[1]): float(words[3]) for words in map(str.split, lines) if words[0] == "step"}


def tokens(lines):
    return next(json.loads(line.removeprefix("tokens: ")) for line in lines if line.startswith("tokens: "))


def by_transformers(folder, given):
    """The tokens that transformers generates from the checkpoint in `folder`, as many and with the same prompt as in `given`."""
    from transformers import AutoModelForCausalLM

    prompt = torch.tensor([given[:5]])
    model = AutoModelForCausalLM.from_pretrained(folder)
    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": len(given) - 5, "do_sample": False, "pad_token_id": 0}
    return model.generate(prompt, **arguments)[0].tolist()


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    """The lines of four steps on one rank without a break; --model '' makes a tiny model in OUT/start."""
    out = tmp_path_factory.mktemp("finetuned")
    return run(*TORCHRUN, 1, *FINETUNE, "", "--out", out, "--steps", "4", "--precision", "float32")


def test_finetune_goes_on_at_another_tp_and_under_accelerate(finetuned, tmp_path):
    """Two steps at tp 2 under torchrun, two at tp 3 that accelerate drives: the losses and tokens of one rank."""
    launch = (*ACCELERATE, "--num-processes", 3, "--main-process-port", 0)
    command = (*FINETUNE, "", "--out", tmp_path, "--precision", "float32", "--steps")
    first = run(*TORCHRUN, 2, *command, "2")
    rest = run(*launch, *command, "4", "--resume", "--accelerate", ACCELERATE_USE_CPU="1")
    assert list(losses(first)) == [0, 1] and list(losses(rest)) == [2, 3]
    assert losses(first) | losses(rest) == pytest.approx(losses(finetuned), abs=2e-4)
    assert tokens(rest) == tokens(finetuned) == by_transformers(tmp_path / "model", tokens(rest))


@pytest.mark.slow
def test_finetune_in_bfloat16_under_accelerate(finetuned, tmp_path):
    """Three steps at tp 2: near float32, and the checkpoint gives the tokens that were printed (in float32, without the casts)."""
    launch = (*ACCELERATE, "--num-processes", 2, "--main-process-port", 0)
    lines = run(*launch, *FINETUNE, "", "--out", tmp_path, "--steps", "3", "--accelerate", ACCELERATE_USE_CPU="1")
    found = losses(lines)
    assert found == pytest.approx({step: losses(finetuned)[step] for step in found}, rel=2e-2)
    assert found != {step: losses(finetuned)[step] for step in found}
    assert tokens(lines) == by_transformers(tmp_path / "model", tokens(lines))


@pytest.mark.slow
@pytest.mark.skipif(not STORIES.is_dir(), reason="the pretrained stories15m is not beside this checkout")
def test_finetune_of_a_pretrained_model(tmp_path):
    lines = run(*TORCHRUN, 2, "examples/finetune.py", "--model", STORIES, "--out", tmp_path, "--steps", "3")
    assert 2.6 < losses(lines)[0] < 2.8 and losses(lines)[2] < 1
    assert tokens(lines) == by_transformers(tmp_path / "model", tokens(lines))


def test_train_2d_resumes_on_another_mesh(tmp_path):
    """Three steps on 2 × 2 ranks, three more on 1 × 4, are six on 4 × 1."""
    run(*TORCHRUN, 4, "examples/train_2d.py", "--tp", 2, "--steps", 3, "--out", tmp_path / "a")
    later = run(*TORCHRUN, 4, "examples/train_2d.py", "--tp", 4, "--steps", 6, "--resume", "--out", tmp_path / "a")
    wanted = run(*TORCHRUN, 4, "examples/train_2d.py", "--tp", 1, "--steps", 6, "--out", tmp_path / "b")
    assert list(losses(later)) == [3, 4, 5] and list(losses(wanted)) == list(range(6))
    assert later == wanted[3:]
    assert weights_apart(tmp_path / "a" / "model", tmp_path / "b" / "model") < 1e-5
    assert weights_apart(tmp_path / "a" / "start", tmp_path / "b" / "model") > 1e-3


def weights_apart(one, other):
    from safetensors.torch import load_file

    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_stages_of_a_pipeline_train_as_one():
    program = ("examples/pipeline.py", "--steps", 3)
    wanted = run(*TORCHRUN, 1, *program, "--pp", 1, "--tp", 1)
    assert list(losses(wanted)) == [0, 1, 2]
    assert run(*TORCHRUN, 4, *program) == wanted
    assert run(*TORCHRUN, 8, *program, "--dp", 2) == wanted


SFT = ("examples/sft_trainer.py", "--lr", "5e-3", "--save-every", "2", "--out")
ON_CPUS = ("-m", "tests.integrations.on_cpus")


def test_sft_trainer_goes_on_on_another_mesh(tmp_path):
    """Two steps at tp 2 over two data-parallel ranks, two at tp 2 alone: the losses of one rank."""
    from transformers import AutoModelForCausalLM

    wanted = losses(run(*TORCHRUN, 1, *SFT, tmp_path / "one", "--steps", "4"))
    first = losses(run(*TORCHRUN, 4, *ON_CPUS, *SFT, tmp_path / "more", "--tp", "2", "--steps", "2"))
    rest = losses(run(*TORCHRUN, 2, *ON_CPUS, *SFT, tmp_path / "more", "--tp", "2", "--steps", "4", "--resume"))
    assert list(first) == [0, 1] and rest == pytest.approx(wanted, abs=2e-4) and wanted[3] < wanted[0]
    assert {step: rest[step] for step in first} == first
    found, one = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict() for name in ("more", "one"))
    assert all(torch.allclose(found[name], one[name], atol=1e-3) for name in one)


@pytest.mark.slow
@pytest.mark.skipif(not STORIES.is_dir(), reason="the pretrained stories15m is not beside this checkout")
def test_sft_trainer_of_a_pretrained_model(tmp_path):
    found = losses(run(*TORCHRUN, 4, *ON_CPUS, *SFT, tmp_path, "--model", STORIES, "--tp", "2", "--steps", "4"))
    assert found[3] < found[0] < 4
