"""The fields of a plan, as immutable values: they tell how parallelize will change a model.

A plan has a layout for each parameter. It has a `ModulePlan` for every module whose forward changes: conversions of arguments and
results, attributes that become local, and changed call sites. A value's placement over the tp mesh dim is R (whole on every rank),
S (each rank its part) or P (partial sum). `autotp.plan.conversions` defines each conversion.
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
from autotp.plan.items import Items
from autotp.plan.layout import Layout


class GradSum(Enum):
    """Which sum a parameter's gradient needs after the local backward."""

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
    """The conversions, in order, of one tensor at a module boundary.

    For an argument, `path` starts with the parameter name of `forward`; keys or indices into it follow. For a result, it has the
    keys or indices into the returned structure, and is () for a bare tensor. A step may stand for all items of a list, or all keys that
    count (`autotp.plan.items`). The rewrite skips a path that is absent in a call.
    """

    path: tuple[str | int, ...]
    conversions: tuple[Conversion, ...]


@dataclass(frozen=True, slots=True)
class Use:
    """A module's forward reads a parameter or buffer, `name` of the module at path `owner`.

    `grad`: the sum that the gradient of this use still needs. `conversions`: applied to the local tensor on each read (SLICE of a
    replicated buffer, ONCE of a row-parallel bias); parameters with a sharded layout are read as their local shard. `written`: when
    the module changes its part of a sliced buffer in place (running statistics). The buffer is then made whole after the forward.
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
    """A plain attribute of the module (`num_heads`, `config.n_embd`, `split_sizes.0`) at `path`, with its two values."""

    path: str
    value: int
    local: int


@dataclass(frozen=True, slots=True)
class Site:
    """The rewrite changes one operator call inside a module's forward, which it finds by the place that makes the call.

    The place is `file` as in the code object, `function` (co_qualname), `line` (co_firstlineno of the function) and `offset`
    (f_lasti of the call).

    `ints`: (position among the call's int arguments in order, global value, local value). A run raises an error where an int is not
    the global value. `multiples`: the same for ints that are a multiple of the global value (batch × heads), and become that multiple of
    the local one. `inputs`/`outputs`: (position among the call's tensor arguments/results, conversions), at `EVERY` for all of a list.
    `given`/`made`: how many of them the call had where their positions matter, () where any number is right. `kernel`: the
    operator's distributed form, which runs instead and defines the result. `over`: the layout of the sharded dim that the kernel's
    statistic crosses. It is needed where that dim has padding or shared indices; where it is None, every local entry counts.
    `over_dim`: which dim of the kernel's input that is, counted from the right (negative). `sizes`: (position among the tensors, dim
    from the right, local size) that the call has where a number in the code is changed; a run raises an error where one is another.
    `ones`: (position among the tensors, dim from the right) of dims of size 1 that meet a dim that is cut, and that the code counts; a
    run raises an error where one is longer.
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
    sizes: tuple[tuple[int, int, int], ...] = ()
    multiples: tuple[tuple[int, int, int], ...] = ()
    given: tuple[int, ...] = ()
    made: tuple[int, ...] = ()
    ones: tuple[tuple[int, int], ...] = ()

    @property
    def checks(self) -> bool:
        """True where the call is checked and nothing of it is changed."""
        return bool(self.ones) and not (self.ints or self.inputs or self.outputs or self.kernel or self.sizes or self.multiples)


#: In place of a position among the tensors of a call: all of them.
EVERY = -1


@dataclass(frozen=True, slots=True)
class Pairs:
    """A module of experts gets the (token, slot) pairs whose experts the rank holds (`autotp.rewrite.experts`).

    tokens, index, weights: the names of the arguments of its forward. Tokens are [T, H]; `index` and `weights` are [T, k], the experts
    of each token and what their results are multiplied with. experts: how the experts are dealt over the ranks; each parameter's dim 0
    is cut so. attributes: those that hold the number of experts, local while the forward runs. width: the module's plan as it was
    proven with the width of each expert cut, and `layouts` its parameters' then.
    """

    tokens: str
    index: str
    weights: str
    experts: Expr
    attributes: tuple[LocalAttribute, ...] = ()
    width: ModulePlan | None = None
    layouts: tuple[ParamPlan, ...] = ()


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """Everything that changes at one module; `path` is "" for the root.

    `joint`: groups of paths, relative to this module. The modules of a group lie inside this one, and their results meet in one sum
    during a call of this module. All but the last HOLD their partial sums, and the last one JOINs them
    (`autotp.planner.joint_reductions`). `uncalled`: no traced call runs the module, and its parameters are sharded for others; a
    call of it is an error. `stashed`: attributes in which its forward leaves a part or a summand of a value, for the model's own
    code to read. `pairs`: it is called with the pairs of this rank's experts alone. `unread`: its own parameters that no traced call
    reads, where its code holds values that are not whole. `items`: the containers that a call may only have as a traced one had them.
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
    pairs: Pairs | None = None
    unread: tuple[str, ...] = ()
    items: tuple[Items, ...] = ()

    @property
    def changed(self) -> tuple[Site, ...]:
        """Returns the calls that are changed, without those that are only checked."""
        return tuple(s for s in self.sites if not s.checks)


class Shown(Enum):
    """How code outside of a module gets a value at the module's boundary that is not simply whole."""

    PART = "part"
    SUM = "summand"
    HELD = "held"  # its sum is taken at another module
    GRADIENT = "gradient"  # whole itself, but its gradient is a summand
    UNKNOWN = "unknown"  # no trace shows it


@dataclass(frozen=True, slots=True)
class Boundary:
    """One tensor at a module's boundary is not whole: an argument or, if `result`, a result; `path` as in `Slot`.

    whole: what makes a result whole in a call of the module by itself; None where that is not known.
    """

    result: bool
    path: tuple[str | int, ...]
    shown: Shown
    whole: Conversion | None = None

    def __str__(self) -> str:
        return f"{'result' if self.result else 'argument'} {'.'.join(map(str, self.path))}".strip()


@dataclass(frozen=True, slots=True)
class ParamPlan:
    """The layout of one parameter. `axis` names its axis ("layers.0.attention: heads"), and `reason` says why it is replicated.

    ruled_out_by: parameters whose requested layouts rule its axis out; () where the reason is another one.
    """

    name: str
    layout: Layout
    axis: str = ""
    reason: str = ""
    ruled_out_by: tuple[str, ...] = ()


class DistributedForm(Enum):
    """An operator that runs in a distributed form of its own on shards."""

    LOOKUP = "lookup"  # embedding rows sharded: ids outside the rank's rows give zeros; the result is P
    MEAN = "mean"  # mean over a sharded dim: the local mean / tp is P
    RMS_NORM = "rms_norm"  # normalised dim sharded: mean square all-reduced
    LAYER_NORM = "layer_norm"  # normalised dim sharded: mean and variance all-reduced
    VAR = "var"  # var/std over a sharded dim
    VECTOR_NORM = "vector_norm"  # 2-norm over a sharded dim
    WEIGHT_NORM = "weight_norm"  # a weight over its 2-norm, along a sharded dim


#: a tensor at a module's boundary: (path of the module, path in its arguments or result)
SlotKey = tuple[str, tuple[str | int, ...]]


@dataclass(frozen=True, slots=True)
class Tokens:
    """What is known of hidden states between regions, for sequence parallelism.

    by_token: modules whose forward treats tokens one by one. left: results of regions that code outside treats token by token.
    entered: arguments of regions that such code made. again: modules that gather such an argument once more in the backward.
    between: what operators outside of regions send.
    """

    by_token: frozenset[str] = frozenset()
    left: frozenset[SlotKey] = frozenset()
    entered: frozenset[SlotKey] = frozenset()
    again: frozenset[str] = frozenset()
    between: tuple[Traffic, ...] = ()


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
    """A collective of the plan: it moves `width` elements a token, or `elements` for any number of tokens (a parameter's gradient).

    tokens: it is there because hidden states are in token parts. argument: the one that it converts, "" for a result and what is neither.
    An all-to-all moves what is routed: `width` is what a rank gets where it gets every token.
    """

    module: str
    kind: CollectiveKind
    when: When
    width: int = 0
    elements: int = 0
    tokens: bool = False
    argument: str = ""


@dataclass(frozen=True, slots=True)
class Collective:
    """A collective with its size: `bytes` of its result. `kind` and `when` equal their texts (`"all_reduce"`, `"forward"`)."""

    module: str
    kind: CollectiveKind
    when: When
    bytes: int


@dataclass(frozen=True, slots=True)
class PaddedAxis:
    """The ranks hold an axis of `size` indices as `padded` slots in all; `pattern` as in `AxisInfo`."""

    pattern: str
    size: int
    padded: int


@dataclass(frozen=True, slots=True)
class PlanSpec:
    """The fields of a `Plan`; functions over them compute costs, exports and texts.

    The plan of one model over `tp` ranks:

    params: fqn → ParamPlan, in the model's order (tied names each). modules: the changes at each module. axes: the sharded axes.
    traffic: the collectives before they are given a size. aliases: tied name → the first name of the same parameter. products:
    names of the parameters that are operands of products (Linear and expert weights). notes: remarks for the reader (paths that
    were not traced). checked: the checks that the plan passed besides its replay on fake tensors: `numbers` (the model and its
    ranks were run and compared), `numbers of a smaller twin`, either with `(2 of 6 calls)`, or `graph only: why`.
    boundaries: path of a module → its tensors that code outside of it does not get whole (`autotp.planner.boundaries`). inside:
    path of each module whose own code computes on parts → the forms in which it was called while tracing, empty where none is
    known. swapped: (path, class) of each module that a forward put in place of another while tracing. idle: modules that no traced
    call ran. holds: path of each module whose own code holds values that are not simply whole → the worst of them
    (`autotp.planner.holding`), where modules or parameters are in no traced call. untrained: why calls in training mode are refused,
    "" where they were traced. copies: path of a module → its results that callers get gathered or summed, while code inside goes on
    with the part. settings: names of settings of the model's adapters that were traced beside the one that it has. tokens: where
    hidden states may stay in token parts. together: groups of Linears that read one tensor. least_scattered: bytes of a sum from
    which a SCATTER scatters it; a smaller one is all-reduced. ones: path of an argument of the model → its dims, counted from the
    last, that no call makes longer.
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
    idle: frozenset[str] = frozenset()
    holds: Mapping[str, Shown] = field(default_factory=dict)
    untrained: str = ""
    copies: Mapping[str, tuple[tuple[str | int, ...], ...]] = field(default_factory=dict)
    settings: frozenset[str] = frozenset()
    tokens: Tokens = Tokens()
    together: tuple[tuple[str, ...], ...] = ()
    least_scattered: int = 0
    ones: tuple[tuple[tuple[str | int, ...], tuple[int, ...]], ...] = ()

    def __post_init__(self) -> None:
        for name in _MAPPINGS:
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __hash__(self) -> int:
        """Equal plans have one hash: a plan can stand in a set, or be a key."""
        return hash((self.model, self.tp, frozenset(self.params.items())))

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
        """Linear and expert parameters that stay replicated: `strict=True` refuses them."""
        return tuple(n for n in self.replicated if n in self.products)

    @property
    def attributes(self) -> Mapping[str, tuple[int, int]]:
        """`module.attribute` → (value, local value) of every attribute made local."""
        return {".".join(filter(None, (m.path, a.path))): (a.value, a.local) for m in self.modules for a in m.attributes}


#: Fields of a plan that nobody may write into.
_MAPPINGS = ("params", "aliases", "boundaries", "inside", "holds", "copies")
