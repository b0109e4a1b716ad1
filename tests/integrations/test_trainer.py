"""Trainer and SFTTrainer train a parallel model as one device does: losses, norms, weights, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import autotp
from autotp.integrations.trainer import ParallelTrainer
from tests.integrations.lifted import several_devices
from tests.integrations.subjects import Recording, Rows, furthest, lora, subject, whole
from tests.support.slow import swept

pytestmark = [pytest.mark.timeout(240), pytest.mark.filterwarnings("ignore")]  # the reference is trained here, and upstream warns

FIGURES = ("loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy", "num_tokens")


def accuracy(prediction: Any) -> dict[str, float]:
    found, labels = prediction.predictions.argmax(-1)[:, :-1], prediction.label_ids[:, 1:]
    counted = labels != -100
    return {"rows": len(labels), "tokens": int(counted.sum()), "accuracy": float((found == labels)[counted].mean())}


def trained(name: str, tp: int | None, out: str, kind: str = "trainer", resume: str | None = None, **options: Any) -> dict[str, Any]:
    """Five steps of two batches of four rows; what the trainer logged, the weights, the batches of this rank."""
    if tp is not None:
        with several_devices():
            return _trained(name, tp, out, kind, resume, **options)
    return _trained(name, tp, out, kind, resume, **options)


def _trained(name: str, tp: int | None, out: str, kind: str, resume: str | None, **options: Any) -> dict[str, Any]:
    import transformers
    from transformers import Trainer, TrainingArguments

    transformers.utils.logging.disable_progress_bar()
    model, dp = subject(name, tp)
    rows = {"per_device_train_batch_size": 4 // dp, "per_device_eval_batch_size": 4 // dp, "gradient_accumulation_steps": 2, "max_steps": 5}
    logs = {"logging_steps": 1, "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 1}
    steps = {"learning_rate": 1e-2, "max_grad_norm": 0.5, "warmup_steps": 2, "save_steps": 3, "save_strategy": "no"}
    collate, evaluated = Recording(), None
    cls: Any = {"trainer": Trainer, "parallel": type("Tuner", (ParallelTrainer, Trainer), {})}[kind]
    if "eval_strategy" in options:
        evaluated = Rows(22)
    settings = TrainingArguments(out, **(rows | logs | steps | options))
    trainer = cls(model, settings, train_dataset=Rows(), eval_dataset=evaluated, data_collator=collate, compute_metrics=accuracy)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(Path(out) / "final"))
    return {"logs": trainer.state.log_history, "weights": whole(model, tp), "batches": collate.seen, "save_only": settings.save_only_model}


def figures(result: dict[str, Any], keys: tuple[str, ...] = FIGURES) -> list[dict[str, float]]:
    return [{key: log[key] for key in keys if key in log} for log in result["logs"] if "loss" in log]


def same(result: dict[str, Any], wanted: dict[str, Any], keys: tuple[str, ...] = FIGURES) -> None:
    """Float64 weights and norms; transformers logs losses in float32."""
    found, expected = figures(result, keys), figures(wanted, keys)
    assert len(found) == len(expected) == 5
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=2e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-6 if "entropy" in a else 1e-10)
    assert furthest(result["weights"], wanted["weights"]) < (1e-5 if "entropy" in found[0] else 1e-9)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The training of one device, with an evaluation at its end."""
    made: dict[str, Any] = {}

    def of(name: str) -> dict[str, Any]:
        if name not in made:
            out = str(tmp_path_factory.mktemp(name))
            made[name] = trained(name, None, out, eval_strategy="steps", eval_steps=5, save_strategy="steps") | {"out": out}
        return made[name]

    return of


@pytest.mark.parametrize(("name", "world"), swept([("llama", 2), ("gpt2", 2), ("llama", 4), ("gpt2", 4)], ("llama", 2), ("gpt2", 4)))
def test_trainer(pool, alone, tmp_path, name, world):
    """Over tp 2, and over tp 2 and two data-parallel ranks, with no line for it; the directory that it saves is one device's."""
    from transformers import AutoModelForCausalLM

    results = pool.run(trained, name, 2, str(tmp_path), world=world)
    for result in results:
        same(result, alone(name))
    batches = [result["batches"] for result in results]
    assert batches[0] == batches[1]
    if world == 4:
        assert batches[2] == batches[3]
        assert all(not set(a) & set(b) for a, b in zip(batches[0], batches[2], strict=True))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float64)
    assert furthest(again.state_dict(), results[0]["weights"]) == 0
    assert "distributed" not in (tmp_path / "final" / "config.json").read_text()


def test_another_learning_rate_is_seen(pool, alone, tmp_path):
    """The comparison tells a training that differs."""
    with pytest.raises(AssertionError):
        same(pool.run(trained, "llama", 2, str(tmp_path), world=2, learning_rate=1.001e-2)[0], alone("llama"))


@pytest.mark.parametrize(("first", "then"), swept([(2, 4), (4, 2)], (4, 2)))
def test_parallel_trainer_resumes_on_another_mesh_and_evaluates(pool, alone, tmp_path, first, then):
    """Two steps are trained again, from a checkpoint of other ranks: the figures and weights of a training without a break."""
    options = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps"}
    whole_run = pool.run(trained, "llama", 2, str(tmp_path / "a"), "parallel", world=first, **options)
    checkpoint = tmp_path / "a" / "checkpoint-3"
    assert {path.name for path in checkpoint.iterdir()} >= {"training_state", "scheduler.pt", "model.safetensors", "rng_state_0.pth"}
    assert not (checkpoint / "optimizer.pt").exists()
    resumed = pool.run(trained, "llama", 2, str(tmp_path / "b"), "parallel", str(checkpoint), world=then, **options)
    for result in (*whole_run, *resumed):
        same(result, alone("llama"))
        assert not result["save_only"]
        evaluated, wanted = (next(log for log in r["logs"] if "eval_rows" in log) for r in (result, alone("llama")))
        for key in ("eval_rows", "eval_tokens", "eval_accuracy"):
            assert evaluated[key] == wanted[key]
        assert evaluated["eval_loss"] == pytest.approx(wanted["eval_loss"], rel=2e-6)
    assert len(resumed[0]["batches"]) < len(whole_run[0]["batches"])


def test_best_model(pool, tmp_path):
    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1, "learning_rate": 0.3}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
    wanted = trained("llama", None, str(tmp_path / "one"), **options)
    found = pool.run(trained, "llama", 2, str(tmp_path / "two"), "parallel", world=2, **options)
    last = [{log["step"]: log["eval_loss"] for log in r["logs"] if "eval_loss" in log} for r in (found[0], wanted)]
    assert last[0] == pytest.approx(last[1], rel=1e-5) and min(last[1].values()) < last[1][5]  # not the last is best
    assert furthest(found[0]["weights"], wanted["weights"]) < 1e-8


def test_weights_alone_are_resumed_as_on_one_device(pool, alone, tmp_path):
    """A plain Trainer keeps weights only, and starts the optimizer anew from them, as it does on one device."""
    options = {"save_strategy": "steps", "save_only_model": True}
    pool.run(trained, "llama", 2, str(tmp_path / "two"), world=2, **options)
    checkpoint = str(tmp_path / "two" / "checkpoint-3")
    assert not (Path(checkpoint) / "training_state").exists()
    wanted = trained("llama", None, str(tmp_path / "one"), resume=checkpoint, **options)
    for result in pool.run(trained, "llama", 2, str(tmp_path / "again"), "trainer", checkpoint, world=2, **options):
        same(result, wanted)
    with pytest.raises(AssertionError):
        same(wanted, alone("llama"))  # which is another training than one that keeps moments


def refusals(out: str) -> list[str]:
    """What is said where a Trainer cannot train rightly."""
    from transformers import Trainer, TrainingArguments

    said = []
    with several_devices():
        settings = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "per_device_eval_batch_size": 2}
        for strategy, shard in (("steps", True), ("no", False)):
            model, _ = subject("llama", 2, shard=shard)
            try:
                Trainer(model, TrainingArguments(out, save_strategy=strategy, **settings), train_dataset=Rows())
                said.append("nothing")
            except (ValueError, autotp.AutoTPError) as error:
                said.append(f"{type(error).__name__}: {error}")
    return said


def test_refused(pool, tmp_path):
    for state, mesh in pool.run(refusals, str(tmp_path), world=4):
        assert state.startswith("ValueError: Resuming is not supported for models sharded at load time")
        assert mesh.startswith("PlanError: 4 ranks train a model that is parallel over 2 of them")
        assert "autotp.fully_shard(model, mesh)" in mesh


def test_evaluate_of_a_plain_trainer_counts_rows_twice(pool, alone, tmp_path):
    """The reason for `ParallelTrainer.evaluate`; upstream does the same with its own tensor parallelism."""
    options = {"eval_strategy": "steps", "eval_steps": 5}
    log = next(log for log in pool.run(trained, "llama", 2, str(tmp_path), world=2, **options)[0]["logs"] if "eval_rows" in log)
    wanted = next(log for log in alone("llama")["logs"] if "eval_rows" in log)
    assert (log["eval_rows"], wanted["eval_rows"]) == (42, 22)


def tuned(tp: int | None, out: str, parallel: bool, **options: Any) -> dict[str, Any]:
    """As `trained`, by trl's SFTTrainer on sentences of words, with checkpointed activations."""
    if tp is not None:
        with several_devices():
            return _tuned(tp, out, parallel, **options)
    return _tuned(tp, out, parallel, **options)


def _tuned(tp: int | None, out: str, parallel: bool, resume: str | None = None, adapters: str = "", **options: Any) -> dict[str, Any]:
    import datasets
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *(f"w{i}" for i in range(62))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    texts = [{"text": " ".join(f"w{(7 * i + j * j) % 62}" for j in range(5 + i % 6))} for i in range(24)]
    model, dp = subject("llama", tp, adapters=adapters == "first")
    rows = {"per_device_train_batch_size": 4 // dp, "gradient_accumulation_steps": 2, "max_steps": 5, "max_grad_norm": 0.5}
    logs = {"logging_steps": 1, "report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False, "seed": 1, "learning_rate": 1e-2}
    settings = SFTConfig(out, activation_checkpointing=True, **(rows | logs | {"save_strategy": "no", "save_steps": 3} | options))
    more: dict[str, Any] = {}
    if adapters and adapters == "trainer's":
        more = {"peft_config": lora()}
        torch.manual_seed(1)
    cls: Any = type("Tuner", (ParallelTrainer, SFTTrainer), {}) if parallel else SFTTrainer
    trainer = cls(model, settings, train_dataset=datasets.Dataset.from_list(texts), processing_class=wrapped, **more)
    trainer.train(resume_from_checkpoint=resume)
    return {"logs": trainer.state.log_history, "weights": whole(trainer.model, tp)}


@pytest.mark.sweep  # examples/sft_trainer.py runs as a program
@pytest.mark.parametrize("world", [2, 4])
def test_sft_trainer(pool, tmp_path, world):
    wanted = tuned(None, str(tmp_path / "one"), False)
    for result in pool.run(tuned, 2, str(tmp_path / "more"), False, world=world):
        same(result, wanted)
    pool.run(tuned, 2, str(tmp_path / "first"), True, world=world, save_strategy="steps")
    checkpoint = str(tmp_path / "first" / "checkpoint-3")
    for result in pool.run(tuned, 2, str(tmp_path / "then"), True, world=world, resume=checkpoint, save_strategy="steps"):
        same(result, wanted, FIGURES[:-1])  # trl counts tokens from the resume on


@pytest.mark.sweep
@pytest.mark.parametrize(("adapters", "world"), [("trainer's", 2), ("first", 4)])
def test_sft_trainer_of_adapters(pool, tmp_path, adapters, world):
    """`peft_config=` of a parallel model; with FSDP beside it the adapters are there before."""
    pytest.importorskip("peft", reason="adapters are tested with PEFT installed")
    wanted = tuned(None, str(tmp_path / "one"), False, adapters=adapters)
    for result in pool.run(tuned, 2, str(tmp_path / "more"), False, world=world, adapters=adapters):
        same(result, wanted)
