"""Reads YAML text into plain data whose every key and value knows its place in the text.

`yaml.compose` reads it, which keeps positions, not `yaml.load`. Two mistakes are caught here, because no later step could find
them. One is a key that stands twice in one mapping. The other is a word (`no`, `off`, `yes`, `on`) that YAML reads as a boolean
where text is meant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from autotp.errors import RecipeError
from autotp.recipe.problems import Pos, Problem

Path = tuple[str, ...]
_WORDS = frozenset(("yes", "no", "on", "off", "y", "n"))
#: Bytes of a text, levels of nesting, entries that aliases repeat: more than any recipe has, its exact plan included.
MOST = 2 * 2**20
MOST_LEVELS = 50
MOST_REPEATED = 10_000


@dataclass
class Source:
    """Holds data read from `file`, the places of keys and of values by path, and the mistakes in the text."""

    file: str
    data: Any = None
    keys: dict[Path, Pos] = field(default_factory=dict)
    values: dict[Path, Pos] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    quoted: set[Path] = field(default_factory=set)
    seen: set[int] = field(default_factory=set)
    repeated: int = 0

    def at(self, path: Sequence[object], *, key: bool = False) -> Pos:
        """Returns the place of a value (of its key), or of the nearest thing around it."""
        found: Path = tuple(map(str, path))
        table = self.keys if key else self.values
        while found and found not in table:
            found, table = found[:-1], self.values
        return table.get(found, Pos(self.file, 1 if self.values else 0, 1))

    def inside(self, path: Sequence[object]) -> Pos:
        """Returns the place of the first character of a text."""
        found = tuple(map(str, path))
        return self.at(found).after(1 if found in self.quoted else 0)


def read(text: str, file: str) -> Source:
    """Returns the data of a YAML text.

    Raises:
        RecipeError: the text is not YAML; says where.
    """
    source = Source(file)
    if len(text) > MOST:
        raise RecipeError(f"{Pos(file, 1, 1)}: {len(text)} characters, wanted at most {MOST}")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = Pos(file, mark.line + 1, mark.column + 1) if mark else Pos(file, 1, 1)
        raise RecipeError([f"{where}: not YAML: {error.problem or error}"]) from error
    except yaml.YAMLError as error:
        raise RecipeError([f"{Pos(file, 1, 1)}: not YAML: {error}"]) from error
    except RecursionError as error:
        raise RecipeError(f"{Pos(file, 1, 1)}: not YAML that can be read: {_DEEP}") from error
    source.data = {} if node is None else _plain(node, (), source, set())
    return source


def from_data(data: Mapping[Any, Any], file: str = "<dict>") -> Source:
    """Wraps data that a program made: its places are names, not lines.

    Raises:
        RecipeError: it is nested deeper than any recipe.
    """
    return Source(file, _texts(data, file, 0))


_DEEP = f"nested too deep, wanted at most {MOST_LEVELS} levels"


def _texts(data: Any, file: str, level: int) -> Any:
    if level > MOST_LEVELS:
        raise RecipeError(f"{file}: {_DEEP}")
    if isinstance(data, Mapping):
        return {str(k): _texts(v, file, level + 1) for k, v in data.items()}
    return [_texts(v, file, level + 1) for v in data] if isinstance(data, list | tuple) else data


def _pos(node: yaml.Node, file: str) -> Pos:
    mark = node.start_mark
    return Pos(file, mark.line + 1, mark.column + 1)


def _plain(node: yaml.Node, path: Path, source: Source, around: set[int]) -> Any:
    pos = _pos(node, source.file)
    source.values[path] = pos
    if id(node) in around:
        source.problems.append(Problem(pos, "an alias that contains itself"))
        return None
    if len(around) > MOST_LEVELS:
        raise RecipeError(f"{pos}: {_DEEP}")
    source.repeated += id(node) in source.seen
    source.seen.add(id(node))
    if source.repeated > MOST_REPEATED:
        raise RecipeError(f"{pos}: aliases repeat more than {MOST_REPEATED} entries: write down what is meant")
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, source, around | {id(node)})
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, str(i)), source, around | {id(node)}) for i, item in enumerate(node.value)]
    if node.style in ("'", '"'):
        source.quoted.add(path)
    if _is_word(node):
        text = f'YAML reads {node.value} as {node.value.lower() in ("yes", "on", "y")}: write "{node.value}" in quotes'
        source.problems.append(Problem(pos, text))
        return node.value
    try:
        return yaml.SafeLoader("").construct_object(node)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # a date that is none, a number of thousands of digits
        source.problems.append(Problem(pos, str(getattr(error, "problem", error))))
        return None


def _mapping(node: yaml.MappingNode, path: Path, source: Source, around: set[int]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in node.value:
        pos = _pos(key, source.file)
        if not isinstance(key, yaml.ScalarNode):
            source.problems.append(Problem(pos, "a key must be text"))
            continue
        name = key.value
        if _is_word(key):
            source.problems.append(Problem(pos, f'YAML reads the key {name} as a truth value: write "{name}" in quotes'))
        if name in out:
            source.problems.append(Problem(pos, f"the key {name} stands twice; first at {source.keys[*path, name]}"))
            continue
        source.keys[*path, name] = pos
        out[name] = _plain(value, (*path, name), source, around)
    return out


def _is_word(node: yaml.Node) -> bool:
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    return plain and node.value.lower() in _WORDS and str(node.tag).endswith(":bool")
