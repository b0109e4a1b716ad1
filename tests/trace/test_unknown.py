"""Numbers that no trace knows, paths that no trace made, and data that code puts into tensors past all operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autotp
from autotp.axes.find import keep
from autotp.errors import TraceError
from autotp.inputs.paths import user_examples
from autotp.testing import NotEquivalent
from autotp.testing.outcome import equal_or_refused
from autotp.trace import drawn_numbers
from autotp.trace.run import trace

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Two(nn.Module):
    """Two Linears with `between` them; `n` counts calls in training mode."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor], first: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.a, self.b, self.between = first(16, 24), nn.Linear(24, 16), between
        self.norm = nn.BatchNorm1d(24, momentum=None)
        self.register_buffer("n", torch.tensor(0))
        self.register_buffer("seen", torch.zeros(24))
        self.register_buffer("sizes", torch.tensor([2, 4]))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self, self.a(x)))  # type: ignore[no-any-return]


def cumulative_norm(m: Any, h: Tensor) -> Tensor:
    return m.norm(h.flatten(0, 1)).view(*h.shape[:2], -1)


def mean_so_far(m: Any, h: Tensor) -> Tensor:
    if m.training:
        m.n.add_(1)
        m.seen.lerp_(h.detach().mean((0, 1)), 1 / float(m.n))
    return h - m.seen


def by_filled_sizes(m: Any, h: Tensor) -> Tensor:
    """Fills uninitialized memory with sizes and reads them, as detection models do with those of their levels."""
    sizes = torch.empty((2, 2), dtype=torch.long)
    for i, n in enumerate((2, 4)):
        sizes[i, 0], sizes[i, 1] = n, h.shape[0]
    torch._check_tensor_all_with(ValueError, sizes.prod(1).sum() == h.shape[:2].numel(), lambda: "the sizes are not those of the pieces")
    torch._check_tensor_all_with(ValueError, m.seen < 1e9, lambda: "too large")
    return torch.cat([piece.flip(1) for piece in h.split(sizes[:, 0].tolist(), dim=1)], dim=1)


def by_logarithm(m: Any, h: Tensor) -> Tensor:
    if m.training:
        m.n.add_(1)
        return h / (1 + math.log(int(m.n)))
    return h


def built(between: Any, first: type[nn.Linear] = nn.Linear) -> nn.Module:
    torch.manual_seed(0)
    return Two(between, first).double()


@pytest.mark.parametrize("between", [cumulative_norm, by_logarithm, by_filled_sizes])
@pytest.mark.parametrize("tp", [2, 3])
def test_unknown_numbers_that_are_divided_by(between: Any, tp: int) -> None:
    assert autotp.plan(built(between), tp=tp, example_inputs={"x": X}, check="graph").local_share < 0.6
    assert str(equal_or_refused(lambda: built(between), inputs={"x": X}, tp=tp, certificate="graph")).startswith("equal")


def test_a_mean_so_far_is_equal_or_refused() -> None:
    assert str(equal_or_refused(lambda: built(mean_so_far), inputs={"x": X}, tp=2, certificate="graph")).startswith("equal")


def only_in_training(m: Any, h: Tensor) -> Tensor:
    if m.training:
        h = h.softmax(-1) * float(h.detach().numpy().sum() > 0)
    return h


def test_a_path_in_training_that_no_trace_made_is_refused() -> None:
    found = str(equal_or_refused(lambda: built(only_in_training), inputs={"x": X}, tp=2, certificate="graph"))
    assert found.startswith("refused") and "is called in training mode" in found and "numpy" in found


class Renorm(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.5)
        return super().forward(x)


class Set(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.set_(self.weight * 0.5)  # type: ignore[no-untyped-call]
        return super().forward(x)


class InPlace(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.copy_(torch.renorm(self.weight, 2, 0, 0.5))
        return super().forward(x)


def clamped_outside(m: Any, h: Tensor) -> Tensor:
    m.b.weight.data = m.b.weight.data.clamp(-0.1, 0.1)
    return h.tanh()


def clamped_in_place(m: Any, h: Tensor) -> Tensor:
    m.b.weight.data.clamp_(-0.1, 0.1)
    return h.tanh()


def buffer_replaced(m: Any, h: Tensor) -> Tensor:
    m.seen.data = m.seen.data * 0.9 + 0.1 * h.detach().mean((0, 1))
    return h - m.seen


@pytest.mark.parametrize(
    ("between", "first"),
    [(Tensor.tanh, Renorm), (Tensor.tanh, Set), (clamped_outside, nn.Linear), (buffer_replaced, nn.Linear)],
)
def test_other_data_in_a_tensor_is_refused(between: Any, first: Any) -> None:
    plain = (lambda m, h: between(h)) if between is Tensor.tanh else between
    with pytest.raises(TraceError, match=r"puts other data into a tensor .* write into it in place"):
        autotp.plan(built(plain, first), tp=2, example_inputs={"x": X})


@pytest.mark.parametrize(("between", "first"), [(Tensor.tanh, InPlace), (clamped_in_place, nn.Linear)])
def test_what_is_written_in_place_is_equal(between: Any, first: Any) -> None:
    plain = (lambda m, h: between(h)) if between is Tensor.tanh else between
    assert str(equal_or_refused(lambda: built(plain, first), inputs={"x": X}, tp=2, certificate="graph")).startswith("equal")


def by_counts(m: Any, h: Tensor) -> Tensor:
    rows = h.flatten(0, 1)
    counts = torch.bincount(rows.argmax(-1) % 3, minlength=3).tolist()
    return torch.cat([part.tanh() for part in rows.split(counts)]).view_as(h)


def by_choices(m: Any, h: Tensor) -> Tensor:
    """As experts that sort their tokens: each goes to the two that score highest, in rows of an even number."""
    rows = h.flatten(0, 1)
    places = rows[:, :4].topk(2).indices
    counts = torch.zeros(len(rows), 4, dtype=torch.long).scatter_(1, places, 1).sum(0)
    order = places.flatten().argsort(stable=True)
    parts = [part * (1 + i) for i, part in enumerate(rows[order // 2].split(counts.tolist()))]
    return torch.zeros_like(rows).index_add(0, order // 2, torch.cat(parts)).view_as(h)


def by_a_buffer(m: Any, h: Tensor) -> Tensor:
    pieces = h.split([int(m.sizes[0]), int(m.sizes[1])], dim=1)
    return torch.cat([piece.flip(1) for piece in pieces], dim=1)


def by_a_name(m: Any, h: Tensor) -> Tensor:
    scales = {"scale 0": 0.5, "scale 1": 2.0}
    place = (h.sum() > 0).long()
    return h * scales[f"scale {place}"]


@pytest.mark.parametrize("between", [by_counts, by_choices, by_a_buffer, by_a_name])
def test_numbers_that_belong_together_are_drawn(between: Any) -> None:
    plan = autotp.plan(built(between), tp=2, example_inputs={"x": X}, check="graph")
    assert any("along numbers drawn for" in note for note in plan.notes) or between is by_a_name
    assert str(equal_or_refused(lambda: built(between), inputs={"x": X}, tp=2, certificate="graph")).startswith("equal")


def test_what_is_made_of_drawn_numbers_is_no_constant() -> None:
    """Chosen numbers that are written into a known tensor take what is known of it away."""

    def between(m: Any, h: Tensor) -> Tensor:
        counts = torch.zeros(3, dtype=torch.long)
        alias = counts[:2]
        counts.scatter_(0, h.flatten()[:3].argsort() % 2, 1)
        pieces = h.split([int(n) + 3 * (i == 0) - int(counts.sum()) * (i == 1) + 3 * (i == 1) for i, n in enumerate(alias)], dim=1)
        return torch.cat(pieces, dim=1)

    model = built(between)
    graph = trace(model, user_examples(model, {"x": X}), keep)
    known = [value for value in graph.constants.values() if not value.dtype.is_floating_point]
    assert not any(value.tolist() in ([1, 1, 0], [1, 1]) for value in known)


def test_what_an_operator_writes_by_out_is_no_constant() -> None:
    def between(m: Any, h: Tensor) -> Tensor:
        largest = torch.zeros(2, dtype=torch.long)
        torch.argmax(h.detach().flatten(1), 1, out=largest)
        return h * (largest + 1)[:, None, None]

    model = built(between)
    graph = trace(model, user_examples(model, {"x": X}), keep)
    assert not any(value.tolist() == [0, 0] for value in graph.constants.values())


def test_numbers_that_cannot_be_drawn_are_said() -> None:
    def between(m: Any, h: Tensor) -> Tensor:
        first = int(h.abs().sum() * 0) + 6  # what code makes of a float itself is not drawn
        return torch.cat(h.split([first, int(h.detach().sum().item()) + 1 - first], dim=1), dim=1)

    with pytest.raises(TraceError, match="0 stood for them"):
        autotp.plan(built(between), tp=2, example_inputs={"x": X})


def test_code_that_leaves_torch_is_said() -> None:
    for leave in (lambda h: h.detach().numpy(), lambda h: np.asarray(h.detach()), lambda h: h.untyped_storage()[0]):
        with pytest.raises(TraceError, match=r"[a-z]\. The code takes numbers out of torch there") as caught:
            autotp.plan(built(lambda m, h, leave=leave: leave(h)), tp=2, example_inputs={"x": X})
        assert ".." not in str(caught.value).replace("...", "") and "example_inputs" not in str(caught.value)


def test_the_text_of_an_error_ends_once() -> None:
    def fails(m: Any, h: Tensor) -> Tensor:
        raise ValueError("these data are wrong.")

    with pytest.raises(TraceError, match=r"ValueError: these data are wrong\. Pass example_inputs="):
        autotp.plan(built(fails), tp=2, example_inputs={"x": X})


class Counts(nn.Module):
    """Sorts its rows by what a router says, and goes on by how many there are."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 16), nn.Linear(16, 6)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=3).tolist()
        parts = [self.b(self.between(torch.tanh(self.a(part)), n, counts)) for part, n in zip(x[order].split(counts), counts, strict=True)]
        return torch.cat(parts)[order.argsort()]


#: What code does by a count, with a softmax over the cut dim for some counts.
BY_COUNTS = {
    "more": lambda h, n, counts: h.softmax(-1) if n > 4 else h,
    "none": lambda h, n, counts: h if n else h.softmax(-1),
    "the most": lambda h, n, counts: h.softmax(-1) if max(counts) > 6 else h,
    "the least": lambda h, n, counts: h.softmax(-1) if sorted(counts)[0] == n else h,
    "among them": lambda h, n, counts: h.softmax(-1) if 0 in counts else h,
    "computed": lambda h, n, counts: h.softmax(-1) if (2 * n + 1) % 5 == 0 else h,
    "a share": lambda h, n, counts: h.softmax(-1) if n / sum(counts) > 0.5 else h,
    "a tensor of them": lambda h, n, counts: h.softmax(-1) if torch.tensor(counts).max() > 6 else h,
    "a float": lambda h, n, counts: h.softmax(-1) if math.sqrt(n) > 2.1 else h,
    "a set": lambda h, n, counts: h.softmax(-1) if n in {5, 6, 7} else h,
}
OTHER_ROWS = {f"{i}": {"x": torch.randn(10, 6, generator=torch.Generator().manual_seed(i)).double() * 9} for i in range(6)}


@pytest.mark.parametrize("name", BY_COUNTS)
def test_code_that_goes_by_counts_is_traced_both_ways_or_refused(name: str) -> None:
    found = equal_or_refused(lambda: Counts(BY_COUNTS[name]), inputs={"x": torch.ones(10, 6)}, tp=2, more=OTHER_ROWS, certificate="graph")
    assert ("read from data" in found.refused) is (name in ("a float", "a set"))


#: What the trace does not notice; the check of numbers tries other data.
BESIDE_THE_TRACE = {
    "a size": lambda h, n, counts: h.softmax(-1) if h.shape[0] > 4 else h,
    "a text": lambda h, n, counts: h.softmax(-1) if f"{n}" in ("5", "6", "7", "8", "9", "10") else h,
    "a plain int": lambda h, n, counts: h.softmax(-1) if int(n) > 4 else h,
    "an array": lambda h, n, counts: h.softmax(-1) if np.array(counts).max() > 5 else h,
}


@pytest.mark.parametrize("name", BESIDE_THE_TRACE)
def test_numbers_are_compared_for_other_data(name: str) -> None:
    given = {"x": torch.ones(10, 6)}
    found = equal_or_refused(lambda: Counts(BESIDE_THE_TRACE[name]), inputs=given, tp=2, more=OTHER_ROWS)
    assert found.equal is not None and not found.sharded and found.equal.plan.checked == "numbers"
    with pytest.raises(NotEquivalent):
        equal_or_refused(lambda: Counts(BESIDE_THE_TRACE[name]), inputs=given, tp=2, more=OTHER_ROWS, certificate="graph")


def test_plain_counts_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn_numbers, "_by_a_model", lambda depth: False)
    with pytest.raises(NotEquivalent):
        equal_or_refused(lambda: Counts(BY_COUNTS["more"]), inputs={"x": torch.ones(10, 6)}, tp=2, more=OTHER_ROWS, certificate="graph")


def test_counts_that_decide_nothing_leave_a_region_cut() -> None:
    scaled = equal_or_refused(lambda: Counts(lambda h, n, counts: h * n), inputs={"x": torch.ones(10, 6)}, tp=2, more=OTHER_ROWS)
    assert scaled.refused or scaled.equal is not None
    plain = equal_or_refused(lambda: Counts(lambda h, n, counts: h * 2), inputs={"x": torch.ones(10, 6)}, tp=2, more=OTHER_ROWS)
    assert plain.sharded


class Filled(nn.Module):
    """Rows that are all zero stand for nothing: it leaves them out, and cuts the rest by their number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        filled = (x == 0.0).sum(dim=(-1, -2)) != x[0].numel()
        (rows,) = self.b(self.a(x[filled]).relu()).split([filled.sum().tolist()])
        return rows.sum(0)  # type: ignore[no-any-return]


def test_rows_that_are_all_zero_are_few() -> None:
    rows = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(2))
    with_none = {"a row of zeros": {"x": torch.cat([rows[:1], torch.zeros(1, 5, 16), rows[2:]]).double()}}
    assert equal_or_refused(Filled, inputs={"x": rows}, tp=2, more=with_none).sharded


def test_higher_order_operators_are_named() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    def attended(m: Any, h: Tensor) -> Tensor:
        q = h.view(2, 6, 3, 8).transpose(1, 2)
        return flex_attention(q, q, q).transpose(1, 2).flatten(2)  # type: ignore[union-attr]

    with pytest.raises(TraceError, match=r"higher-order operator of torch .*attn_implementation='sdpa'"):
        autotp.plan(built(attended).float(), tp=2, example_inputs={"x": X.float()})
