"""Reads YAML as plain data, with the line of each key."""

import functools
import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dyconvert.errors import RecipeError
from dyconvert.installation import install_command
from dyconvert.limits import DEPTH, OVERRIDE_BYTES, YAML_BYTES, YAML_NODES, LimitError, check_depth, read_text

Key = tuple[str | int, ...]


@dataclass
class Document:
    """The contents of a YAML file.

    Attributes:
        data: mappings, lists, strings, numbers, booleans and None.
        lines: the line, from 1, of every key and list item.
        problems: the path and message of each problem, such as a key that is given twice.
    """

    data: Any
    lines: dict[Key, int] = field(default_factory=dict)
    problems: list[tuple[Key, str]] = field(default_factory=list)

    def line(self, key: Key) -> int | None:
        """The line of `key`; if it isn't in the file, that of the nearest section around it."""
        while key and key not in self.lines:
            key = key[:-1]
        return self.lines[key] if key else None


def read_yaml(path: Path) -> Document:
    """Read a YAML file that holds one mapping.

    Raises:
        RecipeError: it can't be read, isn't YAML, or holds no mapping.
    """
    try:
        text = read_text(path, YAML_BYTES)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} can't be read: {error}.") from error
    yaml, _ = _yaml()
    try:
        data, node = _parsed(text)
        document = Document(data)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        why = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"{path} isn't YAML{where}: {why}.") from error
    if not isinstance(document.data, dict):
        what = "nothing" if document.data is None else f"a {type(document.data).__name__}"
        raise RecipeError(
            f"{path} holds {what} instead of keys and values. `dyconvert recipes show quickstart` prints an example."
        )
    _walk(node, (), document, yaml)
    return document


def parse_yaml(text: str) -> Any:
    """Parse YAML into values that JSON could hold.

    Raises:
        yaml.YAMLError: it isn't YAML.
        ValueError: it holds other values than plain data, such as a date, or more than a recipe can need.
    """
    if len(text) > OVERRIDE_BYTES:
        raise LimitError(f"it has {len(text):,} characters, and at most {OVERRIDE_BYTES:,} are read")
    return _parsed(text)[0]


def _parsed(text: str) -> tuple[Any, Any]:
    """The data, and the tree of nodes that it comes from."""
    yaml, loader = _yaml()
    try:
        node = yaml.compose(text, loader)
        check_nodes(node, yaml)
        data = yaml.load(text, loader)
    except RecursionError:
        raise LimitError(f"it is nested deeper than {DEPTH} levels") from None
    try:
        json.dumps(data, allow_nan=False)
    except TypeError as error:
        raise ValueError(f"{error}; put it into quotes") from None
    except ValueError as error:
        raise ValueError(f"{error}; a recipe's numbers are finite") from None
    return data, node


def check_nodes(root: Any, yaml: Any) -> None:
    """Refuse a tree that is endless or has a billion values: a few lines of aliases are enough for either.

    Raises:
        LimitError: it is deeper than `DEPTH` or has more than `YAML_NODES` values, an alias's counting each time.
    """

    def within(node: Any) -> Iterable[Any]:
        if isinstance(node, yaml.SequenceNode):
            return node.value
        return itertools.chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else ()

    check_depth(root, within, YAML_NODES)


def _walk(node: Any, path: Key, document: Document, yaml: Any) -> None:
    document.lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*path, index), document, yaml)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen:
                document.problems.append(((*path, key), f"given twice, first on line {seen[key]}"))
            seen[key] = document.lines[(*path, key)] = line
            _walk(value, (*path, key), document, yaml)


@functools.cache
def _yaml() -> tuple[Any, Any]:
    try:
        import yaml
    except ImportError as error:
        raise RecipeError(f"Recipes need PyYAML: {error}. Run `{install_command('train')}`.") from error
    # libyaml's is ten times as fast; PyYAML may be built without it.
    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):  # type: ignore[misc]  # one of two classes
        """Reads YAML 1.2's numbers and booleans: in version 1.1, 5e-5 is a string and `no` is false."""

        yaml_implicit_resolvers = {
            first: [pair for pair in pairs if not pair[0].endswith((":float", ":bool"))]
            for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    number = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?|[0-9]*\.[0-9]+[eE][-+]?[0-9]+)$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789."))
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), [*"tTfF"]
    )
    return yaml, Loader
