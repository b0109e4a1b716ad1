"""Which optimizers give a parallel model the weights of one device: `python -m benchmarks.optimizers [--tp 2] [--only NAME …]`.

Each tiny model is trained for three steps in float64 on one device and on `tp` gloo ranks from the same weights, once for
each optimizer. With ΔW the change of a weight over the three steps, the figure is

    max |ΔW of the ranks − ΔW of one device|  ÷  max |ΔW of one device|      both over all weights of the model

so an optimizer that sees something else shows as 1e-3 or more. The models differ in how their weights are held: cut evenly, fused
(in the layout's order), with shared indices, padded. Prints Markdown.

Biases of attention are frozen: the gradient of a key's bias is zero but for rounding, and what an optimizer makes of its sign
is arbitrary on one device too. Casts to narrower floats are widened, also in torch's Muon: in bfloat16 it multiplies rounding in the
directions in which a gradient is almost zero, on one device as on several.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

STEPS = 3
EQUAL = 1e-7  # rounding of 1e-16, divided by the ε of the optimizer where a gradient is small (Adagrad: 1e-10)
SIZES = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "tie_word_embeddings": False}
OPTIONS = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 64}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
#: column → (config class of transformers, its arguments)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "even": ("LlamaConfig", {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 12}),
    "fused": ("GPT2Config", {**OPTIONS, **NO_DROPOUT}),
    "shared": ("GPTBigCodeConfig", {**OPTIONS, **NO_DROPOUT, "multi_query": True}),
    "padded": ("LlamaConfig", {**SIZES, "vocab_size": 63, "intermediate_size": 63, "num_attention_heads": 3, "num_key_value_heads": 3}),
}


class PerTensor(Optimizer):
    """Optimizers of a few lines that torch has not: `rule(p, grad, lr)` is what is added to a parameter."""

    def __init__(self, params: Iterable[nn.Parameter], rule: Callable[[Tensor, Tensor, float], Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.rule = rule

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(self.rule(p, p.grad, group["lr"]))


def signs(p: Tensor, grad: Tensor, lr: float) -> Tensor:
    """Lion without its momentum."""
    return torch.sign(torch.where(grad.abs() > 1e-12, grad, 0)) * -lr  # a zero gradient is rounding noise, whose sign says nothing


def trust(p: Tensor, grad: Tensor, lr: float) -> Tensor:
    """LARS without its momentum: the step of a parameter is as long as the parameter."""
    return grad * (p.norm() / (grad.norm() + 1e-12)) * -lr


def factored(p: Tensor, grad: Tensor, lr: float) -> Tensor:
    """What Adafactor does to a matrix in its first step: the squared gradient is known by its row and column means."""
    if p.ndim != 2:
        return torch.sign(grad) * -lr
    square = grad * grad + 1e-12
    rows, columns = square.mean(-1, keepdim=True), square.mean(-2, keepdim=True)
    return grad * (rows @ columns / rows.mean()).rsqrt() * -lr


class Both(Optimizer):
    """Muon for matrices inside the model, AdamW for the rest, as Muon is meant to be used."""

    def __init__(self, model: nn.Module) -> None:
        names = dict(model.named_parameters())
        outer = {id(p) for n, p in names.items() if p.ndim != 2 or any(part in n for part in ("embed", "wte", "wpe", "lm_head"))}
        self.parts = [
            torch.optim.Muon([p for p in names.values() if id(p) not in outer], lr=1e-2),
            torch.optim.AdamW([p for p in names.values() if id(p) in outer], lr=1e-2),
        ]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


class OnWhole(Optimizer):
    """Any optimizer on whole parameters: each rank steps a whole copy and keeps its part. Exact, and needs that copy."""

    def __init__(self, model: nn.Module, make: Callable[[nn.Module], Optimizer]) -> None:
        import autotp

        self.model, self.plan = model, autotp.plan_of(model)
        self.whole = nn.Module()
        self.names = {name.replace(".", "/"): name for name, _ in model.named_parameters()}
        state = autotp.full_state_dict(model)
        for key, name in self.names.items():
            self.whole.register_parameter(key, nn.Parameter(state[name].clone()))
        self.inner = make(self.whole)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        import autotp

        grads, params = autotp.full_grads(self.model), dict(self.model.named_parameters())
        for key, name in self.names.items():
            self.whole.get_parameter(key).grad = grads.get(name)
        self.inner.step()
        for key, name in self.names.items():
            local: Tensor = params[name].to_local()  # type: ignore[attr-defined]  # parameters are DTensors
            rank = params[name].device_mesh.get_local_rank()  # type: ignore[attr-defined]
            local.copy_(self.plan.params[name].layout.shard(self.whole.get_parameter(key), rank))


def _torch(name: str, **options: Any) -> Callable[[nn.Module], Optimizer]:
    return lambda model: getattr(torch.optim, name)(model.parameters(), **options)


def _transformers_adafactor(model: nn.Module) -> Optimizer:
    from transformers.optimization import Adafactor

    made: Optimizer = Adafactor(model.parameters(), lr=1e-2, relative_step=False, scale_parameter=False)
    return made


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "SGD, momentum": _torch("SGD", lr=0.1, momentum=0.9),
    "Adam": _torch("Adam", lr=1e-2),
    "AdamW": _torch("AdamW", lr=1e-2),
    "AdamW, fused": _torch("AdamW", lr=1e-2, fused=True),
    "AdamW after clip_grad_norm_": _torch("AdamW", lr=1e-2),
    "NAdam": _torch("NAdam", lr=1e-2),
    "RAdam": _torch("RAdam", lr=1e-2),
    "Adamax": _torch("Adamax", lr=1e-2),
    "Adagrad": _torch("Adagrad", lr=1e-2),
    "Adadelta": _torch("Adadelta"),
    "ASGD": _torch("ASGD", lr=0.1),
    "Rprop": _torch("Rprop", lr=1e-2),
    "RMSprop": _torch("RMSprop", lr=1e-2),
    "sign of the gradient (Lion)": lambda model: PerTensor(model.parameters(), signs, 1e-2),
    "norm ratio (LARS, LAMB)": lambda model: PerTensor(model.parameters(), trust, 1e-2),
    "row and column means (Adafactor)": lambda model: PerTensor(model.parameters(), factored, 1e-2),
    "Adafactor": _torch("Adafactor", lr=1e-2),
    "Adafactor of transformers": _transformers_adafactor,
    "Muon and AdamW": Both,
    "Muon and AdamW, on whole parameters": lambda model: OnWhole(model, Both) if _is_parallel(model) else Both(model),
    "Adafactor, on whole parameters": lambda model: (
        OnWhole(model, OPTIMIZERS["Adafactor"]) if _is_parallel(model) else OPTIMIZERS["Adafactor"](model)
    ),
    "LBFGS": lambda model: torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad], lr=0.1, max_iter=2),
}


def _is_parallel(model: nn.Module) -> bool:
    return any(hasattr(p, "device_mesh") for p in model.parameters())


def build(kind: str) -> nn.Module:
    """One of MODELS, random but the same each time, float64."""
    import transformers

    name, arguments = MODELS[kind]
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**arguments)).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.1 if p.ndim > 1 else 0.5)
    for name, p in model.named_parameters():
        p.requires_grad_(not name.endswith("c_attn.bias"))
    return model.train()


def train(model: nn.Module, name: str) -> None:
    """STEPS steps on fixed tokens."""
    optimizer = OPTIMIZERS[name](model)
    for step in range(STEPS):
        ids = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(step))

        def closure(ids: Tensor = ids) -> Tensor:
            model.zero_grad()
            loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        if name == "LBFGS":
            optimizer.step(closure)  # type: ignore[arg-type]
            continue
        closure()
        if "clip" in name:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


def compare(emit: Callable[[Any], None], kinds: list[str], names: list[str]) -> dict[tuple[str, str], float | str]:
    """On each rank: the figure of each model and optimizer, or the error."""
    import torch.distributed as dist
    import transformers
    from torch.distributed.device_mesh import init_device_mesh

    import autotp
    from autotp.numeric.exact import DOUBLE

    transformers.logging.set_verbosity_error()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    found: dict[tuple[str, str], float | str] = {}
    for kind in kinds:
        start = {n: p.detach().clone() for n, p in build(kind).named_parameters()}
        parallel = autotp.parallelize(build(kind), mesh)
        emit((kind, str(autotp.plan_of(parallel)).splitlines()[:2]))
        parts = [p._local_tensor.clone() for p in parallel.parameters()]  # type: ignore[attr-defined]
        for name in names:
            alone = build(kind)
            with DOUBLE.mode():
                train(alone, name)
            try:
                with torch.no_grad():
                    for p, at_start in zip(parallel.parameters(), parts, strict=True):
                        p._local_tensor.copy_(at_start)  # type: ignore[attr-defined]  # parameters are DTensors
                        p.grad = None
                with DOUBLE.mode():
                    train(parallel, name)
                full = autotp.full_state_dict(parallel)
                change = max(float((p.detach() - start[n]).abs().max()) for n, p in alone.named_parameters())
                error = max(float((p.detach() - full[n]).abs().max()) for n, p in alone.named_parameters())
                found[kind, name] = error / change
            except Exception as problem:  # the next optimizer must have its turn whatever this one raises
                found[kind, name] = f"{type(problem).__name__}: {problem}"
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2, help="number of ranks")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--only", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS), metavar="NAME", help="these optimizers")
    parser.add_argument("--plans", action="store_true", help="also print what each model's plan says about shares and padding")
    args = parser.parse_args()
    from autotp.launch import run_ranks, values

    def show(rank: int, event: tuple[str, list[str]]) -> None:
        if args.plans and rank == 0:
            print(f"{event[0]}: {'; '.join(event[1])}")

    found = values(run_ranks(compare, args.tp, args.models, args.only, timeout=900, on_event=show))
    print(f"| optimizer | {' | '.join(args.models)} |\n|---{'|---' * len(args.models)}|")
    for name in args.only:
        print(f"| {name} | {' | '.join(cell([rank[kind, name] for rank in found]) for kind in args.models)} |")


def cell(results: list[float | str]) -> str:
    """The worst over the ranks."""
    texts = [result for result in results if isinstance(result, str)]
    if texts:
        return texts[0].splitlines()[0].replace("|", "/")[:100]
    worst = max(float(result) for result in results)
    return "equal" if worst <= EQUAL else f"{worst:.1e}"


if __name__ == "__main__":
    main()
