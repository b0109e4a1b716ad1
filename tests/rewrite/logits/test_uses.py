"""Losses of logits in parts, and their gradients, are those of one device, and no rank gathers a row of logits for them."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import autotp
from autotp.errors import AutoTPError
from autotp.numeric.exact import DOUBLE
from autotp.rewrite.collectives.comm import GroupComm
from autotp.rewrite.logits.logits import ParallelLogits
from benchmarks.loss import narrow, peak
from tests.rewrite.logits.uses import IN_PARTS, WHOLE, Use, own_loss
from tests.support.ranks import Pool
from tests.support.slow import swept

SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 44, "attn_implementation": "eager",
}  # fmt: skip
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 45, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
#: kind → config; 45 entries are padded over two ranks, and over four.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "even": ("LlamaConfig", SMALL),
    "tied, padded": ("LlamaConfig", {**SMALL, "vocab_size": 45, "tie_word_embeddings": True}),
    "fused": ("GPT2Config", {**GPT, "attn_implementation": "eager"}),
}


def ids() -> Tensor:
    return torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(1))


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    name, options = MODELS[kind]
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**options)).double()  # type: ignore[no-any-return]


def pair(kind: str, tp: int) -> tuple[nn.Module, nn.Module]:
    alone, mesh = build(kind), init_device_mesh("cpu", (tp,), mesh_dim_names=("tp",))
    return alone, autotp.parallelize(copy.deepcopy(alone), mesh, loss_parallel=True, check="graph")


#: Numbers a token that a rank sends at most in one message: a third for smoothing; *joined* has twice the tokens.
SENT = {"smoothed": 3, "weighted": 3, "joined": 4}
#: The first calls of a model compare their inputs between ranks, by one all-gather.
COMPARED = 1


class Gathered:
    """Notes the most numbers that a rank gives to an all-gather."""

    def __enter__(self) -> Gathered:
        self.most, self.times, self.inner = 0, 0, GroupComm.all_gather

        def all_gather(comm: GroupComm, tensor: Tensor) -> list[Tensor]:
            self.most, self.times = max(self.most, tensor.numel()), self.times + 1
            return self.inner(comm, tensor)

        GroupComm.all_gather = all_gather  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        GroupComm.all_gather = self.inner  # type: ignore[method-assign]


def observed(model: nn.Module, use: Use, gathered: Gathered | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    with DOUBLE.mode(), gathered or nullcontext():
        loss = use(model, ids())
        loss.backward()  # type: ignore[no-untyped-call]
    parallel = isinstance(next(model.parameters()), DTensor)
    grads = autotp.full_grads(model) if parallel else {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def compared(kind: str, tp: int, names: list[str]) -> list[str]:
    """What is wrong with each use."""
    alone, model = pair(kind, tp)
    said = []
    for name in names:
        wanted = observed(alone, {**IN_PARTS, **WHOLE}[name])
        gathered = Gathered()
        got = observed(model, {**IN_PARTS, **WHOLE}[name], gathered)
        assert wanted.keys() == got.keys(), name
        far = max(float((wanted[n] - got[n]).abs().max()) for n in got)
        if type(got["loss"]) is not Tensor or not far <= 1e-9:
            said.append(f"{name}: {type(got['loss']).__name__}, {far} apart")
        if name in IN_PARTS and gathered.most > SENT.get(name, 2) * ids().numel():
            said.append(f"{name}: {gathered.most} numbers were gathered")
        if name == "anything" and gathered.most <= 2 * ids().numel():
            said.append("gathers are not noticed")
    return said


@pytest.mark.parametrize(("kind", "tp"), swept([(kind, tp) for kind in MODELS for tp in (2, 3, 4)], ("tied, padded", 2)))
def test_losses(pool: Pool, kind: str, tp: int) -> None:
    for said in pool.run(compared, kind, tp, [*IN_PARTS, *WHOLE], world=tp):
        assert not said, "\n".join(said)


def messages() -> int:
    """How many collectives a loss and its gradient take beside those of the head's input."""
    _, model = pair("even", 2)
    with Gathered() as gathered, DOUBLE.mode():
        model(input_ids=ids(), labels=ids()).loss.backward()  # type: ignore[operator]
    return gathered.times


def test_a_loss_is_one_message(pool: Pool) -> None:
    assert pool.run(messages) == [1 + COMPARED] * 2


def damaged() -> float:
    """A rank whose part of the vocabulary is said to begin one entry later."""
    alone, model = pair("even", 2)
    wanted = observed(alone, own_loss)
    show: Any = model.lm_head.__dict__["_autotp"].shows  # type: ignore[union-attr, operator]
    v = show.vocabulary
    show.vocabulary = type(v)(v.size, v.each - 1, v.comm, v.mesh)
    got = observed(model, own_loss)
    return max(float((wanted[n] - got[n]).abs().max()) for n in got)


def test_a_shifted_vocabulary_is_noticed(pool: Pool) -> None:
    assert min(pool.run(damaged)) > 1e-3


def around() -> None:
    """What the caller gets: DTensors where gradients are recorded, plain tensors where not; and what is refused."""
    alone, model = pair("tied, padded", 2)
    m: Any = model
    logits = m(input_ids=ids()).logits
    assert type(logits) is ParallelLogits and logits.placements == (Shard(2),) and tuple(logits.shape) == (2, 7, 45)
    assert logits.to_local().shape[2] == logits._vocabulary.held
    whole = alone(input_ids=ids()).logits
    torch.testing.assert_close(logits.full_tensor(), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(logits.cpu(), whole, rtol=0, atol=1e-12)
    assert torch.equal(copy.copy(logits).argmax(-1), whole.argmax(-1)) and logits.max().item() == pytest.approx(whole.max().item())
    view = logits[:, 1:]
    for change in (lambda: view.mul_(2), lambda: logits.div_(2), lambda: logits.__setitem__(0, 0.0), lambda: torch.exp(logits, out=logits)):
        with pytest.raises(AutoTPError, match="in place"):
            change()
    with pytest.raises(IndexError, match="Target 45 is out of bounds"):
        nn.functional.cross_entropy(logits.flatten(0, 1), torch.full((14,), 45))
    with torch.no_grad():
        out = m(input_ids=ids(), labels=ids())
        assert type(out.logits) is Tensor and type(m.lm_head(torch.ones(1, 16, dtype=torch.float64))) is Tensor
        torch.testing.assert_close(out.logits, whole, rtol=0, atol=1e-12)
    made = [x.generate(ids(), max_new_tokens=4, do_sample=False, pad_token_id=0) for x in (alone, m)]  # type: ignore[operator]
    assert torch.equal(*made)
    assert type(m.lm_head(torch.ones(1, 16, dtype=torch.float64))) is ParallelLogits
    assert type(copy.deepcopy(model)(input_ids=ids()).logits) is ParallelLogits


def test_what_a_caller_gets(pool: Pool) -> None:
    pool.run(around)


def changed_elsewhere() -> list[str]:
    """Changes in place that reach the logits on one device by another tensor, and not here: each is refused, at once or when logits are
    used.
    """
    _, model = pair("tied, padded", 2)
    m: Any = model
    here = ids() > 20
    changes: dict[str, Any] = {
        "a column": lambda x: x[..., 3].fill_(-9.0),
        "entries of a column": lambda x: x[:, :, 2].__setitem__(here, -9.0),
        "all in one row": lambda x: x.view(-1).mul_(0.5),
        "data": lambda x: x.data.__setitem__((..., 3), -9.0),
        "a flag": lambda x: nn.functional.relu(x, inplace=True),
        "an alias": lambda x: nn.functional.dropout(x, 0.5, training=False).mul_(2),
        "contiguous": lambda x: x.contiguous().mul_(2),
        "after a column": lambda x: (x[..., :10], x.mul_(2)),
        "after a hook": lambda x: (x.register_hook(lambda g: None), x.mul_(2)),
    }
    said = []
    for name, change in changes.items():
        logits = m(input_ids=ids(), use_cache=False).logits
        try:
            change(logits)
            nn.functional.cross_entropy(logits.flatten(0, 1), ids().flatten())
            said.append(name)
        except AutoTPError as error:
            said += [] if "in place" in str(error) else [f"{name}: {error}"]
    with pytest.raises(ValueError, match="read-only"):
        m(input_ids=ids(), use_cache=False).logits.detach().numpy()[..., 3] = 0.0
    return said


def test_changes_by_another_tensor_are_refused(pool: Pool) -> None:
    assert pool.run(changed_elsewhere) == [[], []]


def without_gradient() -> int:
    """An evaluation's loss is computed from parts; the logits that it returns are gathered once."""
    _, model = pair("even", 2)
    with torch.no_grad(), Gathered() as gathered:
        model(input_ids=ids(), labels=ids())
    return gathered.most


def test_an_evaluation(pool: Pool) -> None:
    assert pool.run(without_gradient) == [2 * 7 * 22] * 2


def peaks(tp: int, loss_parallel: bool) -> int:
    mesh = init_device_mesh("cpu", (tp,), mesh_dim_names=("tp",))
    return peak(autotp.parallelize(narrow(128_000), mesh, loss_parallel=loss_parallel, check="graph"))


@pytest.mark.parametrize("tp", swept([2, 4], 2))
def test_memory(pool: Pool, tp: int) -> None:
    """A loss over 128,000 tokens of a vocabulary needs a tp-th of the memory, and what a plain parallel model needs shows the check."""
    alone = peak(narrow(128_000))
    assert max(pool.run(peaks, tp, True, world=tp)) <= (1 / tp + 0.1) * alone
    assert max(pool.run(peaks, tp, False, world=tp)) > (1 / tp + 0.1) * alone
