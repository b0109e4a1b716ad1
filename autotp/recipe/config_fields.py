"""Finds the config field that gives a size, so that a recipe written by a program fits the model at other sizes too.

Values and the usual meanings of names tell the fields. A wrong guess does no harm: the sizes of a recipe are checked against the
shapes of the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

#: What a factor is called → parts of the names of fields that say its size, the likeliest first.
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
    """Returns the int fields of a config that may be sizes; ids of tokens and the like are none."""
    found = vars(config).items() if hasattr(config, "__dict__") else ()
    return {n: v for n, v in found if type(v) is int and v > 1 and not n.startswith("_") and not n.endswith(("_id", "_ids", "_idx"))}


def expressions(sizes: Mapping[str, int], config: object) -> dict[str, int | str]:
    """Returns name → field, or arithmetic over fields, or the number itself where neither is found."""
    known = fields(config)
    same = {name: [n for n, v in known.items() if v == value] for name, value in sizes.items()}
    out: dict[str, int | str] = {}
    for name, fitting in same.items():
        found = [n for hint in _HINTS.get(_base(name), ()) for n in fitting if hint in n]
        if found:
            out[name] = found[0]
    for name, value in sizes.items():
        if name not in out:
            out[name] = next(_arithmetic(name, value, out, known), value)
    return {name: out[name] for name in sizes}


def candidates(value: int | str, config: object) -> list[str]:
    """Returns the fields that have a number."""
    return [n for n, v in fields(config).items() if v == value]


def _base(name: str) -> str:
    return name.rstrip("0123456789_")


def _arithmetic(name: str, value: int, found: Mapping[str, int | str], known: Mapping[str, int]) -> Iterator[str]:
    """Writes some sizes as the usual arithmetic of others, where the numbers agree: groups, widths of heads, widths of an MLP."""
    heads = [n for n in known if _likely("h", n) and "key_value" not in n and "kv" not in n]
    wide = [n for n in known if n == found.get("e")]
    base = _base(name)
    pairs = {"group": (heads, [str(found.get("kv"))]), "d": (wide, heads)}.get(base, ([], []))
    yield from (f"{a} // {b}" for a in pairs[0] for b in pairs[1] if b in known and known[a] == value * known[b])
    if base == "i":
        yield from (f"{k} * {a}" for a in wide for k in range(2, 9) if known[a] * k == value)


def _likely(name: str, candidate: str) -> bool:
    return any(hint in candidate for hint in _HINTS.get(name, ()))
