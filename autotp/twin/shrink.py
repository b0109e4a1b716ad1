"""Shrinks a transformers config while keeping its structure.

A config field plays a *role* (width, head count, layer count, vocabulary, token id, …) that its name tells. Each role has
one small rule, listed in `autotp.twin.roles.ROLES`; the first that matches
decides. Three properties make the small model a fair stand-in for the large one:

- a head count keeps its kind: multi-head, grouped (fewer key-value heads) or multi-query (one);
- lists that go layer by layer (`layer_types`, …) are cut so that each kind of layer stays once, and the layer count follows;
- equal values of one role stay equal, also across nested configs, and special token ids stay distinct.

Sizes divide by 4, so the small model can be cut 2 and 4 ways; with `sizes_like` they divide as the large one's do.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from autotp.twin.roles import DEPTH, HEAD_NAMES, KV_NAMES, LAYER_INDICES, NOT_DEPTH, ROLES, Node, Sizes, Tree, head_dim_rule, is_int


def _depth_fields(fields: Mapping[str, Any]) -> dict[str, int]:
    """Fields that count layers; none where `depths` says how many blocks each stage has, for then the stages stay."""
    if isinstance(fields.get("depths"), (list, tuple)):
        return {}
    return {
        name: value for name, value in fields.items() if is_int(value) and value > 0 and DEPTH.match(name) and not NOT_DEPTH.search(name)
    }


def _is_layer_list(value: Any, depth: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == depth and depth > 2 and len(set(map(type, value))) == 1


def _kept_layers(fields: Mapping[str, Any], limit: int, outputs: int, most: int = 8) -> list[int]:
    """The layers to keep: the first of each kind, and more until there are `limit` and one for each of `outputs`."""
    depths = _depth_fields(fields)
    depth = depths.get("num_hidden_layers") or depths.get("n_layer") or max(depths.values(), default=0)
    lists = [v for n, v in fields.items() if _is_layer_list(v, depth) and not isinstance(v[0], float) and not _STAGE.match(n)]
    members = [
        set(v) for n, v in fields.items() if isinstance(v, (list, tuple)) and v and LAYER_INDICES.fullmatch(n) and all(map(is_int, v))
    ]
    kinds = [repr([v[i] for v in lists] + [i in chosen for chosen in members]) for i in range(depth)]
    kept = sorted({kinds.index(kind) for kind in kinds})[:most] if lists or members else []
    kept += [i for i in range(depth) if i not in kept][: max(0, min(limit, depth) - len(kept))]
    kept += [i for i in range(depth) if i not in kept][: max(0, min(outputs, depth) - len(kept))]
    return sorted(kept)


_STAGE = re.compile(r"out_indices|.*channels|.*sizes|.*dims?|.*strides?|stage_names|.*indexes|.*widths?|durations")


def _rope(node: Node, value: Any) -> Any:
    """Rotary sections follow the head size; tables with one number per frequency are cut to its length."""
    if not isinstance(value, Mapping):
        return value
    old = node.number("head_dim")
    if node.number("qk_rope_head_dim"):
        head_dim = 8
    else:
        head_dim = head_dim_rule(node, "head_dim", old) if old else node.sizes.hidden // node.sizes.heads
    half = head_dim // 2
    result: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            result[name] = _rope(node, item)
        elif name.endswith("section") and isinstance(item, (list, tuple)):
            share = half // len(item)
            result[name] = [half - share * (len(item) - 1)] + [share] * (len(item) - 1)
        elif name.endswith("_factor") and isinstance(item, (list, tuple)):
            result[name] = list(item[:half])
        elif name == "original_max_position_embeddings":
            result[name] = min(item, 64)
        else:
            result[name] = item
    return result


def _subconfigs(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    return {name: value for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)}


_SKIP = re.compile(
    r"_.*|transformers_version|model_type|architectures|id2label|label2id|num_labels|dtype|torch_dtype|return_dict|problem_type|ignore_keys_at_rope_validation"
    r"|stage_names|output_hidden_states|output_attentions"
)


def _shrunk_fields(config: PreTrainedConfig, tree: Tree) -> dict[str, Any]:
    subs = _subconfigs(config)
    fields = {n: copy.deepcopy(v) for n, v in vars(config).items() if n not in subs and not _SKIP.fullmatch(n)}
    outputs = vars(config).get("_out_indices")
    kept = _kept_layers(fields, tree.sizes.layers, len(outputs or ()))
    depths = _depth_fields(fields)
    old_depth = depths.get("num_hidden_layers") or depths.get("n_layer") or max(depths.values(), default=0)
    node = Node(fields, tree, kept, len(kept))
    result: dict[str, Any] = {}
    for name, value in fields.items():
        if value is None or isinstance(value, (bool, str, float)):
            result[name] = 0.0 if isinstance(value, float) and _DROPOUT.fullmatch(name) else value
        elif name in depths:
            result[name] = len(kept) if value == old_depth else min(value, tree.sizes.layers)
        elif _is_layer_list(value, old_depth) and not _STAGE.match(name):
            result[name] = type(value)(value[i] for i in kept)
        elif name in ("rope_parameters", "rope_scaling"):
            result[name] = _rope(node, value)
        else:
            result[name] = value
            for pattern, rule in ROLES:
                if pattern.fullmatch(name) and (is_int(value) or isinstance(value, (list, tuple, Mapping))):
                    result[name] = rule(node, name, value)
                    break
    if fields.get("head_dim", 0) is None and node.number("num_attention_heads") and node.number("hidden_size"):
        result["head_dim"] = result["hidden_size"] // result["num_attention_heads"]
    if outputs is not None:
        by_layer = old_depth and len(vars(config).get("stage_names", ())) == old_depth + 1
        result["out_indices"] = list(range(len(kept) - len(outputs) + 1, len(kept) + 1)) if by_layer else list(outputs)
    for name in list(result):
        if isinstance(result[name], Mapping) and name not in ("rope_parameters", "rope_scaling"):
            result[name] = dict(result[name])
    return result


_DROPOUT = re.compile(
    r".*(drop|dropout|dropout_rate|drop_rate|drop_prob|drop_path_rate|pdrop|layerdrop|mask_time_prob|mask_feature_prob)(_\w+)?"
)


def _build(config: PreTrainedConfig, tree: Tree, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    nested = {n.split(".", 1)[0] for n in overrides if "." in n}
    subs = {
        name: _build(sub, tree, {n.split(".", 1)[1]: v for n, v in overrides.items() if n.startswith(name + ".")})
        for name, sub in _subconfigs(config).items()
    }
    fields = _shrunk_fields(config, tree)
    fields.update(copy.deepcopy(dict(tree.irregular.get(config.model_type, {}))))
    fields.update({n: v for n, v in overrides.items() if "." not in n})
    unknown = nested - set(subs)
    if unknown:
        raise ValueError(f"{type(config).__name__} has no nested config {sorted(unknown)}; it has {sorted(subs)}")
    try:
        return type(config)(**fields, **copy.deepcopy(subs))
    except (TypeError, ValueError, AttributeError, KeyError):
        return type(config)(**fields, **{name: sub.to_dict() for name, sub in subs.items()})


#: Head counts up to this stay; larger ones are halved while that is possible.
MOST_HEADS = 64


def sizes_like(config: PreTrainedConfig, tp: int) -> Sizes:
    """Small sizes that `tp` divides, or does not, as it does those of `config`.

    Head counts stay as they are (of the text model, where there are several), heads become 8 wide, and vocabularies and inner
    widths keep their remainders.
    """
    node = Node(dict(vars(config.get_text_config())), Tree(Sizes()), [], 0)
    heads, kv = node.number(*HEAD_NAMES) or 0, node.number(*KV_NAMES) or 0
    if heads <= 2:
        return Sizes(modulus=8 * tp)
    grouped = 1 < kv < heads and heads % kv == 0
    while heads > MOST_HEADS and heads % 2 == 0 and (not grouped or (heads // 2) % kv == 0):
        heads //= 2
    if not grouped:
        kv = next(n for n in (4, 3, 2, 1) if heads % n == 0)
    return Sizes(heads=heads, kv_heads=kv, hidden=8 * heads, modulus=8 * tp)


def shrink_config(
    config: PreTrainedConfig,
    sizes: Sizes | None = None,
    *,
    irregular: Mapping[str, Mapping[str, Any]] | None = None,
    **overrides: Any,
) -> PreTrainedConfig:
    """A config of the same class and structure with small sizes; the argument is left as it is.

    Args:
        config: any transformers config, nested ones included.
        sizes: what widths, head counts, … become at most.
        irregular: fields to set by model type, wherever in the tree a config of that type is nested.
        overrides: fields to set after shrinking; `**{"text_config.num_experts": 8}` reaches into nested configs.

    Raises:
        ValueError: an override names a nested config that does not exist, or the config class refuses the sizes.
    """
    return _build(config, Tree(sizes or Sizes(), irregular or {}), overrides)
