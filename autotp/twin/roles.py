"""Tells the role of a config field from its name, and gives the rule that shrinks it.

`ROLES` is a table: a pattern of field names and the rule for them. A rule gets the config's node (its fields and what is kept), the
name and the value, and gives the small value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Sizes:
    """The small sizes that the large values become."""

    hidden: int = 64
    ffn: int = 128
    layers: int = 2
    heads: int = 8
    kv_heads: int = 4
    vocab: int = 128
    experts: int = 4
    experts_per_token: int = 2
    positions: int = 128
    image: int = 32
    patch: int = 8
    modulus: int = 1  # vocabularies and inner widths keep their remainder by it


@dataclass(slots=True)
class Tree:
    """The state that all configs nested in one model share: sizes and the renumbering of token ids."""

    sizes: Sizes
    irregular: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    token_ids: dict[int, int] = field(default_factory=dict)

    def token_id(self, value: int) -> int:
        """Small ids stay; large ones are renumbered downwards from the end of the vocabulary, distinct ones distinctly."""
        if value < 0:
            return value
        if value not in self.token_ids:
            taken = set(self.token_ids.values())
            limit = self.sizes.vocab
            free = value if value < limit // 2 and value not in taken else next(i for i in range(limit - 1, -1, -1) if i not in taken)
            self.token_ids[value] = free
        return self.token_ids[value]


Rule = Callable[["Node", str, Any], Any]


@dataclass(slots=True)
class Node:
    """One config of the tree with its fields, and what its rules need to know of each other."""

    fields: dict[str, Any]
    tree: Tree
    kept_layers: list[int]
    depth: int

    @property
    def sizes(self) -> Sizes:
        return self.tree.sizes

    def number(self, *names: str) -> int | None:
        """The first of these fields that holds a positive int."""
        for name in names:
            value = self.fields.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        return None


HEAD_NAMES = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
KV_NAMES = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads", "kv_n_heads", "multi_query_group_num")
WIDTH_NAMES = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "hidden_dim", "width")
DEPTH = re.compile(
    r"^(n_layers?|(.*_)?num_(\w+_)?layers|num_layers|(\w*_)?(encoder|decoder)_layers|depth|(\w+_)?depth|layers|num_blocks|n_blocks"
    r"|num_hidden_groups|num_mem_blocks|num_residual_layers|x?_?layers|(\w+_)?num_transformer_layers)$"
)
NOT_DEPTH = re.compile(r"(conv|feat|mlp|feature|adapter|skip|kv_shared|expert|_depth_|stage|bits|bins|register|dense_layers|iou_head)")


def is_int(value: Any) -> bool:
    """An int that is no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def _at_most(limit: int) -> Rule:
    return _each(limit)


def _to(attribute: str) -> Rule:
    """Set to a size, never above the old value."""
    return lambda node, name, value: _each(getattr(node.sizes, attribute))(node, name, value)


def _like(attribute: str) -> Rule:
    """Near a size, with the old value's remainder by the modulus."""

    def rule(node: Node, name: str, value: Any) -> Any:
        if not is_int(value):
            return type(value)(rule(node, name, item) for item in value)
        size = getattr(node.sizes, attribute)
        return min(value, size + (value - size) % node.sizes.modulus)

    return rule


def _groups(node: Node, name: str, value: int) -> int:
    """One group stays one; more become the least number of them that divides the heads."""
    least = next((n for n in range(2, node.sizes.heads + 1) if node.sizes.heads % n == 0), 1)
    return least if value >= least else 1


def _heads(node: Node, name: str, value: Any) -> Any:
    """One head stays one, two stay two, more become the usual number; per stage, the power of two below."""
    if not is_int(value):
        powers = (_heads(node, name, v) if isinstance(v, (list, tuple)) else min(1 << (v.bit_length() - 1), 4) for v in value)
        return type(value)(powers)
    return value if value <= 2 else node.sizes.heads


def _kv_heads(node: Node, name: str, value: int) -> int:
    heads = node.number(name.replace("key_value", "attention"), *HEAD_NAMES)
    if value <= 1:
        return value
    if heads is not None and value >= heads:
        return int(_heads(node, name, heads))
    return node.sizes.kv_heads


def head_dim_rule(node: Node, name: str, value: int) -> int:
    """heads × head_dim keeps being the width, or keeps not being it."""
    heads, width = node.number(*HEAD_NAMES), node.number(*WIDTH_NAMES)
    small = node.sizes.hidden // node.sizes.heads
    if value == node.fields.get("qk_rope_head_dim"):
        return min(value, 8)
    if heads is None or width is None or heads * value == width:
        return min(value, small)
    return min(value, 2 * small)


def _qk_head_dim(node: Node, name: str, value: int) -> int:
    """The rotated part and the rest together, where they are counted apart."""
    rope, rest = node.number("qk_rope_head_dim"), node.number("qk_nope_head_dim")
    return min(rope, 8) + min(rest or 16, 16) if rope else head_dim_rule(node, name, value)


def _rotary_dim(node: Node, name: str, value: int) -> int:
    heads, width = node.number(*HEAD_NAMES), node.number(*WIDTH_NAMES)
    small = node.sizes.hidden // node.sizes.heads
    if heads and width and value < width // heads:
        return small // 2
    return min(value, small)


def _width(node: Node, name: str, value: Any) -> Any:
    if is_int(value):
        first, stages = node.number("patch_embeds_hidden_size"), node.fields.get("depths")
        if first is not None and isinstance(stages, (list, tuple)) and value == first << (len(stages) - 1):  # it doubles after each stage
            return int(_stage_widths(node, "", first)) << (len(stages) - 1)
        return min(value, node.sizes.hidden)
    return [_width(node, name, item) for item in value]


def _stage_widths(node: Node, name: str, value: Any) -> Any:
    """Widths that grow from stage to stage keep their ratio; the smallest becomes a quarter of the hidden size."""
    if is_int(value):
        staged = isinstance(node.fields.get("depths"), (list, tuple))
        return min(value, node.sizes.hidden // 4) if staged else _width(node, name, value)
    if not all(is_int(item) for item in value) or not value:
        return [_stage_widths(node, name, item) if isinstance(item, (list, tuple)) else item for item in value]
    stages = node.fields.get("hidden_sizes")
    low = min(stages if isinstance(stages, (list, tuple)) and all(map(is_int, stages)) and stages else value)  # equal ones stay equal
    base = min(low, max(node.sizes.hidden // 4, 4))
    return [min(item, max(4, round(item * base / low / 8) * 8)) for item in value]


def _index_list(node: Node, name: str, value: Any) -> Any:
    """Layer indices: those of kept layers are renumbered; otherwise they become the last layers that there are."""
    if is_int(value):
        return min(value, node.depth - 1)
    if not value or not all(is_int(item) for item in value):
        return value
    renumbered = [node.kept_layers.index(item) for item in value if item in node.kept_layers]
    if len(renumbered) == len(value):
        return renumbered
    return sorted({min(item, node.depth - 1) for item in range(min(len(value), node.depth))})


def _token(node: Node, name: str, value: Any) -> Any:
    if is_int(value):
        return node.tree.token_id(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_token(node, name, item) for item in value)
    return value


def _image(node: Node, name: str, value: Any) -> Any:
    if is_int(value):
        return min(value, node.sizes.image)
    if isinstance(value, Mapping):
        return {key: _image(node, name, item) for key, item in value.items()}
    return type(value)(_image(node, name, item) for item in value)


def _patch(node: Node, name: str, value: Any) -> Any:
    if is_int(value):
        return min(value, node.sizes.patch)
    return type(value)(_patch(node, name, item) for item in value)


def _each(limit: int) -> Rule:
    def rule(node: Node, name: str, value: Any) -> Any:
        return min(value, limit) if is_int(value) else type(value)(rule(node, name, item) for item in value)

    return rule


def _keep(node: Node, name: str, value: Any) -> Any:
    return value


def _repeats(node: Node, name: str, value: Any) -> Any:
    """Blocks per stage."""
    if is_int(value):
        return min(value, node.sizes.layers)
    return type(value)(_repeats(node, name, v) if isinstance(v, (list, tuple)) else min(v, 1) if is_int(v) else v for v in value)


INDICES = (
    r"(?!_?out_)(\w+_)?ind(ex|ic)es|(\w+_)?block_indexes|cross_attention_layers|(\w+_)?layer_(ids|indices|idx)|\w+_idxs"
    r"|global_attention_blocks|moe_layers|mlp_only_layers|attn_layer_indices"
)
LAYER_INDICES = re.compile(INDICES)

#: Field name (regular expression, full match) → rule. The first match decides; a field that none matches stays.
ROLES: tuple[tuple[re.Pattern[str], Rule], ...] = tuple(
    (re.compile(pattern), rule)
    for pattern, rule in (
        # what looks like a size and is none
        (
            r"chunk_size_feed_forward|num_labels|num_channels|num_mel_bins|.*kernel_sizes?|.*strides?|type_vocab_size|.*_index_id"
            r"|keypoint_decoder_dim",
            _keep,
        ),
        (r".*_ratios?|.*_factors?|.*scale|.*temperature|.*_cost|.*_coefficient|.*_per_second|sampling_rate", _keep),
        # vocabulary and its ids
        (
            r".*_token_ids?|.*_token_index|.*(bos|eos|pad|sep|cls|mask|unk|start|end)_id|.*_tokens?_to_.*|.*suppress_tokens"
            r"|forced_\w+_id|bad_words_ids",
            _token,
        ),
        (
            r"(?!type_)(?!.*ngram)(\w+_)?vocab_size(_\w+)?|(\w+_)?codebook_size|entity_vocab_size|n_codes|num_embeddings|num_embeds",
            _like("vocab"),
        ),
        # experts
        (r"(num|n)_(\w+_)?experts|moe_num_experts|(\w+_)?num_experts|n_routed_experts|num_local_experts|num_fused_experts", _to("experts")),
        (
            r"(num_)?(\w+_)?experts_per_(tok|token)|moe_topk|moe_k|top_k_experts|moe_top_?k|num_selected_experts|expert_top_k"
            r"|router_top_?k|num_experts_per_tok.*|moe_num_active_experts",
            _to("experts_per_token"),
        ),
        (r"(n|num)_shared_experts|moe_num_shared_experts|num_shared_expert", _at_most(1)),
        (r"n_group|num_expert_group", _at_most(2)),
        (r"topk_group|num_limited_group", _at_most(1)),
        # attention and recurrent heads
        (
            r"(\w+_)?num_key_value_(attention_)?heads|num_kv_heads|n_head_kv|n_kv_heads?|multi_query_group_num|kv_n_heads|num_kv|n_kv",
            _kv_heads,
        ),
        (r"linear_num_key_heads|linear_num_kv_heads|num_key_heads", _to("kv_heads")),
        (
            r"index_n_heads|(\w+_)?num_(\w+_)?heads|n_heads?|(\w+_)?(encoder|decoder)_attention_heads|(\w+_)?n_heads|(\w+_)?attention_heads|num_query_groups",
            _heads,
        ),
        (r"qk_rope_head_dim", _at_most(8)),
        (r"qk_nope_head_dim|v_head_dim|index_head_dim", _at_most(16)),
        (r"qk_head_dim", _qk_head_dim),
        (r"q_lora_rank|kv_lora_rank|o_lora_rank|(\w+_)?lora_rank|.*low_?rank.*dim|\w+_rank", _at_most(32)),
        (r"mamba_(d_head|head_?dim|headdim)|mamba_num_head_dim|linear_(key|value)_head_dim", _at_most(16)),
        (r"(\w+_)?head_dim|attention_head_size|d_kv|kv_channels|attention_key_size|d_head|(\w+_)?head_size|(\w+_)?dim_head", head_dim_rule),
        (r"rotary_dim|rotary_ndims", _rotary_dim),
        (r"ssm_state_size|state_size|(mamba_)?d_state|mamba_state_(size|dim)", _at_most(8)),
        (r"(mamba_)?n_groups|mamba_n_groups|mamba_ngroups", _groups),
        (r"time_step_rank|mamba_dt_rank", _at_most(4)),
        (r"(\w+_)?chunk_size|mamba_chunk_size", _at_most(16)),
        # positions and windows
        (r"sliding_window|attention_chunk_size|local_attention|attention_window_size|window_size_attention|attention_window", _each(8)),
        (
            r"max_(\w+_)?position_embeddings|n_positions|n_ctx|max_seq(_len|uence_length|_length)|max_sequence_length|seq_length",
            _to("positions"),
        ),
        (r"max_(source|target|speech|text|audio|encoder|decoder)_positions?", _at_most(64)),
        (r"original_max_position_embeddings", _at_most(64)),
        # images
        (r"(?!norm)(\w+_)?image_size|img_size|input_size|crop_size|pretrain_image_size|visual_prompt_size", _image),
        (r"patch_size", _patch),
        (
            r"image_grid_pinpoints",
            lambda node, name, value: [[node.sizes.image, 2 * node.sizes.image], [2 * node.sizes.image, node.sizes.image]],
        ),
        # layers, layer by layer
        (r"first_k_dense_replace|num_dense_layers|(\w+_)?first_k_dense", _at_most(1)),
        (r"(\w+_)?(sparse_step|period|interval|pattern_length|layer_freq|every_n_layers|layer_step|layer_interval|moe_freq)", _each(2)),
        (r"(\w+_)?layer_offset|(\w+_)?offset", _at_most(1)),
        (r"num_kv_shared_layers", lambda node, name, value: min(value, max(node.depth - 2, 0))),
        (r"max_window_layers|num_hash_layers|num_nextn_predict_layers", _at_most(1)),
        (r"(\w+_)?depths|layers_per_stage|blocks_per_stage|num_blocks_per_stage|depth_multiplier_stage", _repeats),
        (INDICES, _index_list),
        # widths
        (r"patch_embeds_hidden_size|stage_(in|mid|out)_channels|stem_channels", _stage_widths),
        (r"num_filters", _at_most(8)),
        (r"downsample_channels|(en|de)coder_in_channels", _width),
        (
            r"(\w+_)?(moe_)?(intermediate_size|ffn_dim|d_ff|ffn_hidden_size|mlp_dim|n_inner|feed_forward_size|dim_feedforward|inner_dim|d_inner)"
            r"|(moe_)?shared_expert_intermediate_size|intermediate_dim|ffn_hidden_dim|share_expert_dim|mlp_hidden_size|d_ffn",
            _like("ffn"),
        ),
        (
            r"hidden_sizes|(\w+_)?hidden_sizes|embed_dims|embed_dim|neck_hidden_sizes|width_list|layers_dims|(\w+_)?embed_dim_per_stage|fpn_hidden_size|(\w+_)?dims",
            _stage_widths,
        ),
        (
            r"(\w+_)?(hidden_size(_global)?|hidden_dim|hidden_dimension|d_model|n_embd|embed(ding)?_(dim|size)|hid_size|projection_dim|projection_size|projection_hidden_size"
            r"|feature_dim|conv_dim|dim|width|out_dim|hidden_channels|query_dim|output_dim|input_dim|proj_size|lru_width|feature_size|num_feats"
            r"|attention_channels|in_features|out_features|mask_feature_size|tdnn_dim|conv_channels|size_per_head_total|embedding_size)",
            _width,
        ),
        (
            r"num_queries|num_query_tokens|(\w+_)?num_queries|num_latents|resampler_n_latents|num_detection_tokens|num_object_queries",
            _at_most(16),
        ),
        (r"(\w+_)?(num_)?groups|conv_groups|\w+_num_groups|num_conv_pos_embedding_groups", _each(4)),
        (r"num_conv_pos_embeddings", _at_most(8)),
    )
)
