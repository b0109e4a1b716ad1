"""Which field of a config a size is, so that a recipe written by a program fits the model at other sizes too.

Fields are told by their values; where several have the value, by what their names usually mean. A wrong guess cannot do harm: the sizes
of a recipe are checked against the shapes of the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

#: What a factor is called → parts of the names of fields that say its size, the likeliest first; "!" parts must not be in it.
_HINTS: Mapping[str, tuple[str, ...]] = {
    "kv": ("num_key_value_heads", "kv_heads", "key_value"),
    "h": ("num_attention_heads", "n_head", "num_heads", "heads"),
    "d": ("head_dim", "head_size", "d_kv", "dim_head"),
    "e": ("hidden_size", "d_model", "n_embd", "dim", "width"),
    "i": ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn", "inner", "moe_intermediate"),
    "v": ("vocab_size", "vocab"),
    "c": ("d_inner", "conv", "intermediate_size", "hidden_size"),
}


def fields(config: object) -> dict[str, int]:
    """Int fields of a config that may be sizes; ids of tokens and the like are none."""
    found = vars(config).items() if hasattr(config, "__dict__") else ()
    return {n: v for n, v in found if type(v) is int and v > 1 and not n.startswith("_") and not n.endswith(("_id", "_ids", "_idx"))}


def expressions(sizes: Mapping[str, int], config: object) -> dict[str, int | str]:
    """Name → field, or arithmetic over fields, or the number itself where neither is found."""
    known = fields(config)
    out: dict[str, int | str] = {}
    for name, value in sizes.items():
        same = [n for n, v in known.items() if v == value]
        found = _likeliest(name, same)
        if found is not None:
            out[name] = found
    used = [str(text) for text in out.values()]
    for name, value in sizes.items():
        if name not in out:
            out[name] = next(_arithmetic(value, used, known), value)
    return {name: out[name] for name in sizes}


def candidates(value: int | str, config: object) -> list[str]:
    """The fields that have a number."""
    return [n for n, v in fields(config).items() if v == value]


def _likeliest(name: str, same: list[str]) -> str | None:
    for hint in _HINTS.get(name.rstrip("0123456789_"), ()):
        hits = [n for n in same if hint in n]
        if hits:
            return min(hits, key=len)
    return same[0] if len(same) == 1 else None


def _arithmetic(value: int, used: list[str], known: Mapping[str, int]) -> Iterator[str]:
    """Quotients and small multiples of fields that other names are."""
    for a in dict.fromkeys(used):
        for b in dict.fromkeys(used):
            if a in known and b in known and a != b and known[a] == value * known[b]:
                yield f"{a} // {b}"
    for a in dict.fromkeys(used):
        for factor in range(2, 9):
            if known.get(a, 0) * factor == value:
                yield f"{factor} * {a}"
