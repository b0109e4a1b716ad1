"""Lists the variants of a transformer-like model, as values.

The models are Python text, as a person would write them, for two reasons: sizes can be literals in the code, and a failure is a
script that stands by itself. Names of modules and parameters mean nothing on purpose: a plan can only follow from the computation.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from autotp.errors import InputError


class Projection(Enum):
    """The ways to make queries, keys and values; the rows of a fused weight."""

    SEPARATE = "separate"
    CONCAT = "concat"  # (h d | kv d | kv d)
    GROUPED = "grouped"  # kv (group d | d | d)
    INTERLEAVED = "interleaved"  # h 3 d; as many keys as queries
    TRANSPOSED = "transposed"  # (h d | kv d | kv d) as columns of a weight that x is multiplied by
    EINSUM = "einsum"  # weights of three dims
    LATENT = "latent"  # keys and values from a narrow latent vector, one rotary key for all heads (MLA)


class Position(Enum):
    """The ways to tell positions apart."""

    NONE = "none"
    LEARNED = "learned"
    LEARNED_FEW = "learned_few"  # added where there are as many tokens as positions, which is so in the traced call
    ROTARY = "rotary"  # halves
    ROTARY_PAIRS = "rotary_pairs"  # neighbours
    ALIBI = "alibi"  # slopes made where they are used
    ALIBI_MODEL = "alibi_model"  # the bias is made once, in the model, and handed to every block
    RELATIVE = "relative"  # a table of biases for each head


class QKNorm(Enum):
    """The dims that queries and keys are normalised over."""

    NONE = "none"
    HEAD = "head"
    FULL = "full"


class Product(Enum):
    """The ways to compute attention."""

    FUSED = "fused"  # the fused operator, keys and values repeated
    FUSED_GROUPED = "fused_grouped"  # the fused operator told to group
    WRITTEN = "written"  # products and a softmax, keys and values repeated
    EINSUM = "einsum"  # einsums over groups, nothing is repeated


class Mlp(Enum):
    """The first part of the mlp."""

    PLAIN = "plain"
    GATED = "gated"
    HALVES = "halves"  # one weight, rows (width | width)
    PAIRS = "pairs"  # one weight, rows width 2


class Experts(Enum):
    """Whether the mlp is a mixture, and how that is computed."""

    NONE = "none"
    LOOP = "loop"  # each expert on its tokens, added where they belong
    DENSE = "dense"  # every expert on every token, weights of three dims
    SHARED = "shared"  # a loop beside an mlp for all tokens


class Norms(Enum):
    """Where a block's norms are."""

    PRE = "pre"
    POST = "post"
    BOTH = "both"


class Sizes(Enum):
    """The ways in which the code says sizes."""

    ATTRIBUTES = "attributes"
    LITERALS = "literals"
    SHAPES = "shapes"


class Turning(Enum):
    """The ways in which queries and keys share the code that turns them; rotary positions only."""

    GENERATOR = "generator"  # one line for both
    LINES = "lines"  # a line for each
    FUNCTION = "function"  # called for each
    MODULE = "module"  # a module, called for each


class Trap(Enum):
    """An operation that has no exact sharding; most run on a shard without an error."""

    NONE = "none"
    WIDTH_SOFTMAX = "width_softmax"
    WIDTH_FLIP = "width_flip"
    WIDTH_ROLL = "width_roll"
    WIDTH_SORT = "width_sort"
    WIDTH_CUMSUM = "width_cumsum"
    WIDTH_FIRST = "width_first"
    WIDTH_BRANCH = "width_branch"
    HEAD_SOFTMAX = "head_softmax"
    HEAD_FLIP = "head_flip"
    HEAD_ROLL = "head_roll"
    HEAD_CUMSUM = "head_cumsum"
    HEAD_FIRST = "head_first"

    @property
    def on_heads(self) -> bool:
        """Is it an operation on attention heads? Else on the mlp's width."""
        return self.value.startswith("head")


class Extra(Enum):
    """Things that some models have."""

    TEMPERATURE = "temperature"  # a factor for each head's queries
    SINK = "sink"  # a logit for each head that takes part in the softmax; with written products
    HEAD_GATE = "head_gate"  # a gate for each head's result
    CHANNEL_GATE = "channel_gate"  # a gate for each entry of all heads' results
    SUB_NORM = "sub_norm"  # a norm over all heads' results
    HEAD_NORM = "head_norm"  # a norm over each head's result
    LAYER_SCALE = "layer_scale"  # a factor for each entry of what a block adds
    ONE_NORM = "one_norm"  # queries and keys share the norm over a head
    LORA = "lora"  # a narrow second way to the queries; with separate projections
    CONV = "conv"  # a causal convolution over time, one for each entry of the mlp's width; without experts
    MEAN = "mean"  # the mean over the mlp's width is subtracted
    VIEW = "view"  # a view takes the mlp's width before the tokens for tokens and width
    DROPOUT = "dropout"
    CAP = "cap"  # the logits pass a tanh
    HEAD_BIAS = "head_bias"  # the head has a bias
    AGAIN = "again"  # the blocks run twice
    CHECKPOINT = "checkpoint"  # blocks are computed again in the backward pass
    SCALED = "scaled"  # embeddings and residuals are multiplied by numbers


ACTIVATIONS = {"gelu": "F.gelu", "relu": "F.relu", "sigmoid": "torch.sigmoid", "silu": "F.silu"}
#: Tokens of the calls that are traced.
TOKENS = 5
ROTARY = (Position.ROTARY, Position.ROTARY_PAIRS)
ALIBI = (Position.ALIBI, Position.ALIBI_MODEL)


@dataclass(frozen=True, slots=True)
class ArchitectureSpec:
    """The choices that make one decoder. Any numbers will do: nothing needs to divide anything."""

    kv: int = 2
    group: int = 2
    size: int = 4
    width: int = 12
    vocab: int = 16
    hidden: int = 0
    layers: int = 1
    projection: Projection = Projection.SEPARATE
    position: Position = Position.ROTARY
    qk_norm: QKNorm = QKNorm.NONE
    product: Product = Product.FUSED
    mlp: Mlp = Mlp.GATED
    experts: Experts = Experts.NONE
    norms: Norms = Norms.PRE
    layer_norm: bool = False
    activation: str = "silu"
    bias: bool = False
    parallel: bool = False
    inline: bool = False
    tied: bool = False
    loss: bool = True
    sizes: Sizes = Sizes.ATTRIBUTES
    trap: Trap = Trap.NONE
    extras: frozenset[Extra] = frozenset()
    turning: Turning = Turning.GENERATOR
    names: int = 0

    def __post_init__(self) -> None:
        problems = [f"{n} is {v!r}, wanted at least 1" for n in _COUNTS if not isinstance(v := getattr(self, n), int) or v < 1]
        if self.activation not in ACTIVATIONS:
            problems.append(f"activation is {self.activation!r}, wanted one of {', '.join(ACTIVATIONS)}")
        if self.position in ROTARY and self.size % 2:
            problems.append(f"rotary positions want an even size, got {self.size}")
        if self.projection in (Projection.INTERLEAVED, Projection.LATENT) and self.group > 1:
            problems.append(f"{self.projection.value} projections want group 1, got {self.group}")
        if self.qk_norm is QKNorm.FULL and self.projection not in (Projection.SEPARATE, Projection.CONCAT, Projection.TRANSPOSED):
            problems.append(f"a norm over all heads wants separate or concatenated projections, got {self.projection.value}")
        if self.projection is Projection.LATENT and self.position in ROTARY and self.position is not Position.ROTARY:
            problems.append("latent projections turn halves: position rotary, or none that rotates")
        if Extra.SINK in self.extras and self.product is not Product.WRITTEN:
            problems.append(f"a sink wants written products, got {self.product.value}")
        if Extra.ONE_NORM in self.extras and self.qk_norm is not QKNorm.HEAD:
            problems.append(f"one norm for queries and keys wants a norm over a head, got {self.qk_norm.value}")
        if Extra.LORA in self.extras and self.projection is not Projection.SEPARATE:
            problems.append(f"lora wants separate projections, got {self.projection.value}")
        if Extra.CONV in self.extras and self.experts is not Experts.NONE:
            problems.append(f"a convolution over time wants a dense mlp, got {self.experts.value} experts")
        if problems:
            raise InputError("Architecture: " + "; ".join(problems))

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv * self.group

    @property
    def embedding(self) -> int:
        """Width of the residual stream."""
        return self.hidden or self.heads * self.size

    @property
    def normed(self) -> tuple[int, ...]:
        """Widths that norms are over. Of one entry (with a mean, of two) a norm is constant, its gradient a rounding error."""
        heads, kv = self.heads * self.size, self.kv * self.size
        own = self.size * (2 if self.projection is Projection.LATENT else 1)
        found = [self.embedding]
        found += {QKNorm.NONE: [], QKNorm.HEAD: [own], QKNorm.FULL: [heads, kv]}[self.qk_norm]
        found += [heads] if Extra.SUB_NORM in self.extras else []
        return (*found, *([self.size] if Extra.HEAD_NORM in self.extras else []))


_COUNTS = ("kv", "group", "size", "width", "vocab", "layers")
