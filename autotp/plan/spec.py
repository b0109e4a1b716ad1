"""The Plan: what parallelize will do to a model, as an immutable value.

A plan is made of per-parameter layouts and, for every module whose forward has something to do, a `ModulePlan`: which
conversions happen to its arguments and results, which attributes become local, which call sites inside its forward are
intervened on. Placements of a value over the tp mesh dim: R (whole on every rank), S (each rank its part), P (partial sum).
`autotp.plan.conversions` says what each conversion does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from math import prod
from types import MappingProxyType
from typing import Any

from autotp.plan.conversions import CollectiveKind, Conversion, When
from autotp.plan.expressions import Expr
from autotp.plan.layout import Layout


class GradSum(Enum):
    """What happens to a parameter's gradient after the local backward."""

    NONE = "none"
    ALL = "all"  # replicated parameter used inside a region: its gradient is a partial sum
    SHARED = "shared"  # sharded parameter with indices that are held more than once: their gradients are partial sums


class Written(Enum):
    """When a forward changes the part of a buffer that it reads."""

    NEVER = "never"
    TRAINING = "training"
    ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class Slot:
    """Conversions, in order, of one tensor at a module boundary.

    `path` for an argument starts with the parameter name of `forward` (then keys or indices into it); for a result it is the
    keys or indices into the returned structure, () for a bare tensor; "*" stands for every item of a list. A path that is
    absent in a call is passed over.
    """

    path: tuple[str | int, ...]
    conversions: tuple[Conversion, ...]


@dataclass(frozen=True, slots=True)
class Use:
    """A parameter or buffer that a module's forward reads: `owner` module path + `name`, and how it reads it.

    `grad`: what the gradient of this use still needs. `conversions`: applied to the local tensor on each read (SLICE of a
    replicated buffer, ONCE of a row-parallel bias); parameters with a sharded layout are read as their local shard. `written`: when
    the module changes its part of a sliced buffer in place (running statistics); the buffer is then made whole after the forward.
    `held`: the code does not (only) read the owner's attribute, but takes the parameter from a list, a closure, `parameters()`.
    """

    owner: str
    name: str
    grad: GradSum = GradSum.NONE
    conversions: tuple[Conversion, ...] = ()
    written: Written = Written.NEVER
    held: bool = False


@dataclass(frozen=True, slots=True)
class LocalAttribute:
    """`path` of a plain attribute of the module (`num_heads`, `config.n_embd`, `split_sizes.0`) and its two values."""

    path: str
    value: int
    local: int


@dataclass(frozen=True, slots=True)
class Site:
    """An intervention on one operator call inside a module's forward, by the place that makes the call.

    The place: `file` as in the code object, `function` (co_qualname), `line` (co_firstlineno of the function), `offset`
    (f_lasti of the call). `ints`: (position among the call's int arguments in order, global value, local value); an int that is
    not `global value` at run time is an error. `inputs`/`outputs`: (position among the call's tensor arguments/results,
    conversions). `kernel`: run the operator's distributed form instead; its result is whatever the kernel says. `over`: the
    layout of the sharded dim that a kernel's statistic crosses, `over_dim` which dim of its input that is, counted from the right
    (negative); needed where it has padding or shared indices, None says that every local entry counts.
    """

    file: str
    function: str
    line: int
    offset: int
    ints: tuple[tuple[int, int, int], ...] = ()
    inputs: tuple[tuple[int, tuple[Conversion, ...]], ...] = ()
    outputs: tuple[tuple[int, tuple[Conversion, ...]], ...] = ()
    kernel: DistributedForm | None = None
    over: Expr | None = None
    over_dim: int = -1


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """Everything that changes at one module; `path` is "" for the root.

    `joint`: paths, relative to this module, of modules inside it whose results meet in one sum during a call of this module:
    all but the last HOLD theirs, the last one JOINs them (`autotp.planner.joint_reductions`). `uncalled`: no traced call runs
    the module, and its parameters are sharded for others; a call of it is an error. `stashed`: attributes in which its forward
    leaves a part or a summand of a value, for the model's own code to read.
    """

    path: str
    inputs: tuple[Slot, ...] = ()
    outputs: tuple[Slot, ...] = ()
    uses: tuple[Use, ...] = ()
    attributes: tuple[LocalAttribute, ...] = ()
    sites: tuple[Site, ...] = ()
    joint: tuple[tuple[str, ...], ...] = ()
    uncalled: bool = False
    stashed: tuple[str, ...] = ()


class Shown(Enum):
    """What a value at a module's boundary is to code outside of the module, where it is not simply whole."""

    PART = "part"
    SUM = "summand"
    HELD = "held"  # its sum is taken at another module
    GRADIENT = "gradient"  # whole itself, but its gradient is a summand
    UNKNOWN = "unknown"  # no trace told


@dataclass(frozen=True, slots=True)
class Boundary:
    """One tensor at a module's boundary that is not whole: an argument or, if `result`, a result; `path` as in `Slot`."""

    result: bool
    path: tuple[str | int, ...]
    shown: Shown

    def __str__(self) -> str:
        return f"{'result' if self.result else 'argument'} {'.'.join(map(str, self.path))}".strip()


@dataclass(frozen=True, slots=True)
class ParamPlan:
    """Layout of one parameter; `axis` names its axis ("layers.0.attention: heads"), `reason` says why it is replicated.

    ruled_out_by: the parameters whose layouts, asked for, rule its axis out; () where something else is the reason.
    """

    name: str
    layout: Layout
    axis: str = ""
    reason: str = ""
    ruled_out_by: tuple[str, ...] = ()


class DistributedForm(Enum):
    """An operator that needs a distributed form of its own when it runs on shards."""

    LOOKUP = "lookup"  # embedding rows sharded: ids outside the rank's rows give zeros; the result is P
    MEAN = "mean"  # mean over a sharded dim: the local mean / tp is P
    RMS_NORM = "rms_norm"  # normalised dim sharded: mean square all-reduced
    LAYER_NORM = "layer_norm"  # normalised dim sharded: mean and variance all-reduced
    VAR = "var"  # var/std over a sharded dim
    VECTOR_NORM = "vector_norm"  # 2-norm over a sharded dim


#: one call: (argument, its kind) of each
Call = frozenset[tuple[str, str]]


#: the calls of one module, without those that are alike
Forms = frozenset[Call]


@dataclass(frozen=True, slots=True)
class AxisInfo:
    """One sharded axis: `pattern` (attention, mlp, moe, embedding, lm head, …), its size and the parameters that carry it.

    `module` is the innermost module that holds all of them; `sites` are the operators that the axis meets.
    """

    name: str
    pattern: str
    size: int
    module: str
    params: tuple[str, ...]
    sites: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Traffic:
    """A collective of the plan: `width` elements a token, or `elements` whatever the tokens (a parameter's gradient)."""

    module: str
    kind: CollectiveKind
    when: When
    width: int = 0
    elements: int = 0


@dataclass(frozen=True, slots=True)
class Collective:
    """A collective with its size: `bytes` of its result. `kind` and `when` equal their texts (`"all_reduce"`, `"forward"`)."""

    module: str
    kind: CollectiveKind
    when: When
    bytes: int


@dataclass(frozen=True, slots=True)
class PaddedAxis:
    """An axis of `size` indices that the ranks hold as `padded` slots in all; `pattern` as in `AxisInfo`."""

    pattern: str
    size: int
    padded: int


@dataclass(frozen=True, slots=True)
class PlanSpec:
    """What a `Plan` says, as fields; what is asked of a plan (costs, exports, texts) is functions over them.

    The plan of one model over `tp` ranks:

    params: fqn → ParamPlan, in the model's order (tied names each). modules: what changes at which module. axes: the sharded
    axes. traffic: the collectives before they are given a size. aliases: tied name → the first name of the same parameter.
    products: names of the parameters that are operands of products (Linear and expert weights). notes: what the
    reader should know (paths that were not traced). checked: what the plan passed besides its replay on fake tensors: `numbers` (the
    model and its ranks were run and compared), `numbers of a smaller twin`, or `graph only: why`.
    boundaries: path of a module → what code outside of it does not see whole there (`autotp.planner.boundaries`). inside: path
    of each module whose own code computes on parts → the forms in which it was called while tracing, empty where none is known. swapped:
    (path, class) of each module that a forward put in place of another while tracing. untrained: why calls in training mode are refused,
    "" where they were traced. copies: path of a module → its results that are gathered or summed for whoever calls it, while code inside
    goes on with the part.
    """

    model: str
    tp: int
    params: Mapping[str, ParamPlan]
    modules: tuple[ModulePlan, ...]
    axes: tuple[AxisInfo, ...]
    traffic: tuple[Traffic, ...]
    aliases: Mapping[str, str]
    products: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    checked: str = ""
    boundaries: Mapping[str, tuple[Boundary, ...]] = field(default_factory=dict)
    inside: Mapping[str, Forms] = field(default_factory=dict)
    swapped: frozenset[tuple[str, str]] = frozenset()
    untrained: str = ""
    copies: Mapping[str, tuple[tuple[str | int, ...], ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _MAPPINGS:
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __reduce__(self) -> Any:
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return type(self), tuple(dict(value) if name in _MAPPINGS else value for name, value in found.items())

    @property
    def local_share(self) -> float:
        """Parameter elements on a rank over all of them; tied parameters count once."""
        own = [p for n, p in self.params.items() if n not in self.aliases]
        whole = sum(prod(p.layout.shape) for p in own)
        return sum(prod(p.layout.local_shape) for p in own) / whole if whole else 1.0

    @property
    def replicated(self) -> Mapping[str, str]:
        """Parameter → why it stays whole on every rank."""
        return {n: p.reason for n, p in self.params.items() if p.layout.dim is None}

    @property
    def replicated_products(self) -> tuple[str, ...]:
        """Linear and expert parameters that stay replicated: what `strict=True` refuses."""
        return tuple(n for n in self.replicated if n in self.products)

    @property
    def attributes(self) -> Mapping[str, tuple[int, int]]:
        """`module.attribute` → (value, local value) of every attribute made local."""
        return {".".join(filter(None, (m.path, a.path))): (a.value, a.local) for m in self.modules for a in m.attributes}


#: Fields of a plan that nobody may write into.
_MAPPINGS = ("params", "aliases", "boundaries", "inside", "copies")
