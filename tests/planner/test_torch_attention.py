"""torch's own attention layers are cut by heads: `nn.MultiheadAttention`, and the layers of `nn.Transformer`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import autotp
from autotp.launch import RankError
from autotp.rewrite.guards import called
from autotp.rewrite.operators import call_sites
from autotp.testing import assert_equivalent, sabotage
from autotp.testing.ranks.run import run
from autotp.testing.ranks.threads import ThreadRanks
from tests.support.ranks import mesh
from tests.support.slow import in_turns

D, HEADS, HIDDEN = 24, 6, 48
CAUSAL = torch.full((5, 5), -1e9, dtype=torch.float64).triu(1)
OF_HEADS = torch.randn(2 * HEADS, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PADDED = torch.tensor([[False, False, False, False, True], [False, False, False, True, True]])


class Attention(nn.Module):
    """One attention of a sequence over itself; `call` are options of the call, `more` of the module."""

    def __init__(self, call: dict[str, Any], **more: Any) -> None:
        super().__init__()
        self.call = call
        self.attention = nn.MultiheadAttention(D, HEADS, **more)

    def forward(self, x: Tensor, mask: Tensor | None = None, padded: Tensor | None = None) -> Any:
        k, v = x, x
        if not self.attention._qkv_same_embed_dim:
            k, v = (nn.functional.pad(x, (0, n - D)) for n in (self.attention.kdim, self.attention.vdim))
        result, weights = self.attention(x, k, v, attn_mask=mask, key_padding_mask=padded, **self.call)
        return result if weights is None else (result, weights)


X = torch.randn(2, 5, D, dtype=torch.float64)
PLAIN: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "sequence first": ({}, {}, {}),
    "one sequence": ({}, {}, {"x": X[0]}),
    "batch first": ({"need_weights": False}, {"batch_first": True}, {}),
    "no bias": ({}, {"batch_first": True, "bias": False}, {}),
    "weights of each head": ({"average_attn_weights": False}, {"batch_first": True}, {}),
    "a float mask": ({"need_weights": False}, {"batch_first": True}, {"mask": CAUSAL}),
    "a mask of truths": ({}, {"batch_first": True}, {"mask": CAUSAL < 0}),
    "a float mask of each head": ({"need_weights": False}, {"batch_first": True}, {"mask": OF_HEADS}),
    "a float mask of each head, weights": ({}, {"batch_first": True}, {"mask": OF_HEADS}),
    "a mask of truths of each head": ({"need_weights": False}, {"batch_first": True}, {"mask": OF_HEADS > 1}),
    "causal": ({"need_weights": False, "is_causal": True}, {"batch_first": True}, {"mask": CAUSAL}),
    "padded keys": ({}, {"batch_first": True}, {"padded": PADDED}),
    "padded keys and a mask": ({"need_weights": False}, {"batch_first": True}, {"padded": PADDED, "mask": CAUSAL < 0}),
    "separate projections": ({}, {"batch_first": True, "kdim": D + 8, "vdim": D + 4}, {}),
    "a key and value for all": ({}, {"batch_first": True, "add_bias_kv": True}, {}),
    "a zero key": ({"need_weights": False}, {"batch_first": True, "add_zero_attn": True}, {}),
}


@pytest.mark.parametrize(("name", "tp"), in_turns(PLAIN, (2, 3, 4)))
def test_multihead_attention(name: str, tp: int) -> None:
    call, more, inputs = PLAIN[name]
    found = assert_equivalent(lambda: Attention(call, **more), tp=tp, inputs={"x": X, **inputs}, steps=1)
    assert set(found.plan.replicated) <= {"attention.out_proj.bias"}


class Encoder(nn.Module):
    """Two layers of torch's encoder, which turns padded sequences into nested ones where it may."""

    def __init__(self, nested: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, HEADS, HIDDEN, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)

    def forward(self, x: Tensor, padded: Tensor | None = None) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padded)


class Whole(nn.Module):
    """Encoder and decoder."""

    def __init__(self, **more: Any) -> None:
        super().__init__()
        self.transformer = nn.Transformer(D, HEADS, 1, 1, HIDDEN, dropout=0.0, **more)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.transformer(x, y, tgt_mask=mask)


@pytest.mark.parametrize("weights", [False, True])
def test_two_masks_of_which_one_is_cut_and_one_made(weights: bool) -> None:
    """The line that gets the mask of each head alone gets that of padded keys in parts already."""
    call, inputs = {"need_weights": weights}, {"x": X, "padded": PADDED, "mask": OF_HEADS > 1}
    found = assert_equivalent(lambda: Attention(call, batch_first=True), tp=2, inputs=inputs, steps=1)
    assert "attention.in_proj_weight" in found.plan.replicated


class Decoder(nn.Module):
    """Two layers of torch's decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(D, HEADS, HIDDEN, dropout=0.0, batch_first=True), 2)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor, other: Tensor) -> Tensor:
        return self.decoder(x, y, tgt_mask=mask, memory_mask=other)


class Masked(nn.Module):
    """Attention as models write it, with what comes from outside for each head."""

    def __init__(self, eager: bool) -> None:
        super().__init__()
        self.eager = eager
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor, mask: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
        q, k, v = (p.view(*x.shape[:2], HEADS, -1).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        if keys is not None:
            k, v = torch.cat([keys, k], 2), torch.cat([keys * 2, v], 2)
        if self.eager:
            scores = q @ k.transpose(-2, -1)
            y = (scores if mask is None else scores + mask).softmax(-1) @ v
        else:
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


#: What comes from outside: its gradient is compared too.
OUTSIDE: dict[str, dict[str, Tensor]] = {
    "a mask of each example and head": {"mask": OF_HEADS.view(2, HEADS, 5, 5)},
    "a mask of each head": {"mask": OF_HEADS[:HEADS].view(1, HEADS, 5, 5)},
    "a mask of each head and key": {"mask": OF_HEADS[:HEADS, :1]},
    "a mask of truths": {"mask": OF_HEADS.view(2, HEADS, 5, 5) > 1},
    "keys": {"keys": OF_HEADS.view(2, HEADS, -1, 1)[:, :, :3].expand(-1, -1, -1, D // HEADS).contiguous()},
}


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(("name", "tp"), in_turns(OUTSIDE, (2, 3, 4)))
def test_what_comes_from_outside_for_each_head(name: str, tp: int, eager: bool) -> None:
    found = assert_equivalent(lambda: Masked(eager), tp=tp, inputs={"x": X, **OUTSIDE[name]}, steps=1, certificate="graph")
    assert found.sharded == {"qkv.weight", "qkv.bias", "out.weight"}
    floats = {f"argument {key}" for key, given in OUTSIDE[name].items() if given.is_floating_point()}
    assert floats <= set(found.aspects["gradients"].paths)


def test_mistakes_with_a_mask_are_noticed() -> None:
    """The control: each conversion of the plan is needed."""
    inputs = {"x": X, **OUTSIDE["a mask of each example and head"]}
    found = sabotage.survey(lambda: Masked(eager=True), tp=2, inputs=inputs)
    assert len(found.caught) >= 6 and not found.survived, str(found)


LAYERS: dict[str, tuple[Any, dict[str, Tensor]]] = {
    "encoder": (lambda: Encoder(nested=False), {"x": X}),
    "encoder of padded sequences": (lambda: Encoder(nested=False), {"x": X, "padded": PADDED}),
    "both, norms first": (lambda: Whole(batch_first=True, norm_first=True, activation="gelu"), {"x": X, "y": X, "mask": CAUSAL}),
    "both, sequence first": (lambda: Whole(), {"x": X, "y": X}),
    "both, a mask of each head": (lambda: Whole(batch_first=True), {"x": X, "y": X, "mask": OF_HEADS}),
    "decoder, masks of each head": (lambda: Decoder(), {"x": X, "y": X, "mask": OF_HEADS, "other": OF_HEADS > 1}),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize(("name", "tp"), in_turns(LAYERS, (2, 3)))
def test_layers(name: str, tp: int) -> None:
    factory, inputs = LAYERS[name]
    found = assert_equivalent(factory, tp=tp, inputs=inputs, steps=1)
    whole = ("norm.weight", "norm.bias", "norm1", "norm2", "norm3", "out_proj.bias", "linear2.bias")
    assert all(any(part in name for part in whole) for name in found.plan.replicated)


def _without_gradients(_: Any) -> list[float]:
    """The largest difference of padded and plain calls in evaluation, where torch's own fast path runs on whole weights."""
    torch.manual_seed(0)
    model = Encoder().double().eval()
    with torch.no_grad():
        wanted = [model(X), model(X, PADDED)]
    autotp.parallelize(model, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), example_inputs=[{"x": X}, {"x": X, "padded": PADDED}])
    with torch.no_grad():
        got = [model(X), model(X, PADDED)]
    return [float((a - b).abs().max()) for a, b in zip(wanted, got, strict=True)]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_evaluation_without_gradients() -> None:
    """torch takes another path there, with nested tensors, that no trace shows."""
    ranks = ThreadRanks(2, 60.0, turns=True)
    try:
        assert all(difference < 1e-9 for found in ranks.run(_without_gradients, None) for difference in found)
    finally:
        ranks.stop()


def test_a_plan_that_the_rewrite_cannot_carry_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the rewrite does not open the function, the replay sees it, and all stays whole."""
    monkeypatch.setattr(call_sites, "opened", lambda function: None)
    call, more, inputs = PLAIN["batch first"]
    found = assert_equivalent(lambda: Attention(call, **more), tp=2, inputs={"x": X, **inputs})
    assert "attention.in_proj_weight" in found.plan.replicated


#: how an encoder layer is traced, and then called: `None` for a mask that is left out
MASKS: dict[str, tuple[dict[str, Tensor], dict[str, Tensor], str]] = {
    "a padding mask": ({}, {"src_key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])}, "key_padding_mask"),
    "a mask of each head": ({"src_mask": torch.zeros(5, 5)}, {"src_mask": torch.zeros(2 * HEADS, 5, 5)}, "attn_mask"),
}


def refusals(name: str) -> list[str]:
    """What the ranks say to the second call."""
    traced, given, _ = MASKS[name]

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.TransformerEncoderLayer(D, HEADS, 24, 0.0, batch_first=True).double()

    x = torch.randn(2, 5, D, dtype=torch.float64)

    def rank(_: object) -> str:
        made = autotp.parallelize(build(), mesh(), example_inputs={"src": x, **traced}, check="graph")
        assert torch.allclose(made(x, **traced), build()(x, **traced), rtol=0, atol=1e-9)
        with pytest.raises(autotp.AutoTPError, match="the calls that were traced") as refused:
            made(x, **given)
        return str(refused.value)

    return list(run("local", rank, None, 2, 120.0))


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_of_another_form_is_refused(name: str) -> None:
    """torch's own attention takes another path for it, and expands it to the heads of one device."""
    assert all(f"self_attn (MultiheadAttention) is called with {MASKS[name][2]} as" in said for said in refusals(name))


class Starred(nn.Module):
    """Takes any number of sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, *every: Tensor) -> Tensor:
        a, b = every
        h = self.q(a).relu()
        return self.o(h * 2 if a is b else h * self.q(b).mean(1, keepdim=True))


class Crossed(nn.Module):
    """Attention of one sequence over another, which may be the same one. `code`: torch's, that of the module, or that of another."""

    def __init__(self, code: str) -> None:
        super().__init__()
        self.code, self.inner = code, Starred()
        self.attention, self.q, self.o = nn.MultiheadAttention(D, HEADS, batch_first=True), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.code == "torch":
            return self.attention(x, y, y)[0]
        if self.code == "star":
            return self.inner(x, y)
        q = self.q(x)
        return self.o(q.relu() + self._other(q, q if x is y else self.q(y)))

    def _other(self, q: Tensor, k: Tensor) -> Tensor:
        return q * 2 if q is k else q * k.mean(1, keepdim=True)


Y = X[:, :3] * 2
#: how a module of two arguments is traced, and whether calls with two tensors and with one are then right
TWICE: dict[str, tuple[list[dict[str, Tensor]], tuple[bool, bool]]] = {
    "apart": ([{"x": X, "y": Y}], (True, False)),
    "one": ([{"x": X, "y": X}], (False, True)),
    "both": ([{"x": X, "y": Y}, {"x": X, "y": X}], (True, True)),
}


def _twice(case: tuple[str, str, str]) -> tuple[bool, bool]:
    name, code, certificate = case
    torch.manual_seed(0)
    model, parallel = Crossed(code).double(), Crossed(code).double()
    parallel.load_state_dict(model.state_dict())
    made = autotp.parallelize(parallel, mesh(), example_inputs=TWICE[name][0], check=certificate)
    assert autotp.plan_of(made).local_share < 0.9
    found = []
    for call in ({"x": X, "y": Y}, {"x": X, "y": X}):
        try:
            found.append(torch.allclose(made(**call), model(**call), rtol=0, atol=1e-9))
            assert found[-1]
        except autotp.AutoTPError as error:
            assert "one tensor" in str(error) or "no tensor twice" in str(error)  # noqa: PT017
            found.append(False)
    return found[0], found[1]


@pytest.mark.parametrize("certificate", ["numbers", "graph"])
@pytest.mark.parametrize("code", ["torch", "own", "star"])
@pytest.mark.parametrize("name", TWICE)
def test_arguments_that_are_one_tensor(name: str, code: str, certificate: str) -> None:
    """Code that asks `q is k` takes another path for them: torch's attention projects them together."""
    assert list(run("local", _twice, (name, code, certificate), 2, 120.0)) == [TWICE[name][1]] * 2


def test_without_the_check_torch_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    monkeypatch.setattr(called, "runs_opened", lambda cls: False)
    with pytest.raises(RankError, match="must match the size"):
        refusals("a padding mask")
