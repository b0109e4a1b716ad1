"""Plans written by hand, to test the rewrite without the planner."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from autotp.plan.conversions import Conversion, Op
from autotp.plan.expressions import Expr, Factor
from autotp.plan.layout import Layout, replicated
from autotp.plan.spec import DistributedForm, ModulePlan, ParamPlan, Site, Slot, Use
from autotp.rewrite.apply import apply
from autotp.rewrite.collectives.comm import GroupComm
from autotp.rewrite.parameters.full import full_grads
from autotp.rewrite.parameters.make import shard_onto
from autotp.rewrite.undo import Undo

COPY, REDUCE = Conversion(Op.COPY), Conversion(Op.REDUCE)
COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def even(shape: Any, dim: int, tp: int) -> Layout:
    """Contiguous even parts of one dim."""
    shape = tuple(shape)
    dims: list[Expr] = [Factor(f"n{i}", n, sharded=i == dim) for i, n in enumerate(shape)]
    return Layout(shape, tuple(dims), tp)


def embedding_site(kernel: DistributedForm | None = DistributedForm.LOOKUP, forward: Any = nn.Embedding.forward, **changes: Any) -> Site:
    """A site at the only call that `forward` makes; the offset is that of its last CALL before RETURN."""
    import dis

    code = forward.__code__
    offset = [i.offset for i in dis.get_instructions(code) if i.opname == "CALL"][-1]
    return Site(code.co_filename, code.co_qualname, code.co_firstlineno, offset, kernel=kernel, **changes)


def llama_plan(model: nn.Module, tp: int) -> tuple[dict[str, ParamPlan], list[ModulePlan]]:
    """Megatron's plan for LlamaForCausalLM, written out."""
    params: dict[str, ParamPlan] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owner = name.split(".")[-2]
        if owner in (*COLUMN, "embed_tokens", "lm_head"):
            layout = even(p.shape, 0, tp)
        elif owner in ("o_proj", "down_proj") and p.ndim == 2:
            layout = even(p.shape, 1, tp)
        else:
            layout = replicated(p.shape, tp)
        params[name] = ParamPlan(name, layout)
    modules: list[ModulePlan] = []
    for path, sub in model.named_modules():
        leaf = path.rsplit(".", 1)[-1]
        if leaf in COLUMN:
            modules.append(ModulePlan(path, inputs=(Slot(("input",), (COPY,)),)))
        elif leaf in ("o_proj", "down_proj"):
            uses = () if sub.bias is None else (Use(path, "bias", conversions=(Conversion(Op.ONCE),)),)
            modules.append(ModulePlan(path, outputs=(Slot((), (REDUCE,)),), uses=uses))
        elif leaf == "lm_head":
            vocab = Conversion(Op.GATHER, -1, params["lm_head.weight"].layout.dims[0])
            modules.append(ModulePlan(path, inputs=(Slot(("input",), (COPY,)),), outputs=(Slot((), (vocab,)),)))
        elif leaf == "embed_tokens":
            modules.append(ModulePlan(path, outputs=(Slot((), (REDUCE,)),), sites=(embedding_site(),)))
    return params, modules


def tiny_llama(*, layers: int = 2, bias: bool = False, tied: bool = False, seed: int = 0) -> nn.Module:
    """A random float64 llama with 4 heads on 2 kv heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64, attention_bias=bias, mlp_bias=bias, tie_word_embeddings=tied,
        pad_token_id=3, eos_token_id=None, bos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    return model


def tp_mesh() -> DeviceMesh:
    """All ranks of this process group in one dim."""
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def rewrite(model: nn.Module, params: dict[str, ParamPlan], modules: list[ModulePlan]) -> tuple[GroupComm, Undo]:
    """Apply to the mesh of all ranks."""
    mesh = tp_mesh()
    comm = GroupComm(mesh.get_group())
    return comm, apply(model, params, modules, comm=comm, make_param=shard_onto(mesh))


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative to the largest entry of `a`."""
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))


def worst_grad(reference: nn.Module, model: nn.Module, params: dict[str, ParamPlan], comm: GroupComm) -> float:
    """Largest relative error of a gradient; every parameter with one must have one in both."""
    grads = full_grads(model, params, comm)
    wanted = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    assert list(grads) == list(wanted)
    return max(error(wanted[n], grads[n]) for n in wanted)
