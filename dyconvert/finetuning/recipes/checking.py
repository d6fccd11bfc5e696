"""All of a recipe's errors at once, each with its path, its line, and the nearest valid name."""

import difflib
import json
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from dyconvert.errors import RecipeError
from dyconvert.finetuning.recipes.yaml_file import Document, Key, parse_yaml
from dyconvert.limits import DEPTH

M = TypeVar("M", bound=BaseModel)


@dataclass
class RecipeFile:
    """A recipe's or sweep's file: its contents, and the overrides of the command line."""

    path: Path
    document: Document
    overrides: Sequence[str] = ()


def validated(model: type[M], file: RecipeFile) -> M:
    """Make a `model` from the file's contents and its overrides.

    Raises:
        RecipeError: the file has errors; all are listed.
    """
    data = file.document.data
    lines = [_line(file, {}, key, message) for key, message in file.document.problems]
    problems: list[tuple[Key, str]] = []
    overridden: dict[Key, str] = {}
    for override in overrides_of(file.overrides):
        try:
            overridden[_override(data, override)] = override
        except ValueError as error:
            problems.append(((override,), str(error)))
            overridden[(override,)] = override
    try:
        # Strict: "3" and true are no numbers. From JSON: a list may become a tuple.
        checked = model.model_validate_json(json.dumps(data), strict=True)
        if not problems and not lines:
            return checked
    except ValidationError as error:
        problems += _problems(model, error, data)
    # A union reports each of its members.
    merged: dict[Key, list[str]] = {}
    for key, message in problems:
        merged.setdefault(key, []).append(message)
    lines += [_line(file, overridden, key, "; or ".join(messages)) for key, messages in merged.items()]
    count = f"{len(lines)} errors" if len(lines) > 1 else "an error"
    listed = "".join(f"\n  {line}" for line in lines)
    raise RecipeError(f"{file.path} has {count}:{listed}")


def overrides_of(overrides: Any) -> list[str]:
    """Overrides, such as "train.lr=0.01", as a list.

    Raises:
        RecipeError: they are no texts.
    """
    several = isinstance(overrides, Iterable) and not isinstance(overrides, str | bytes)
    listed = list(overrides) if several else [overrides]
    if isinstance(overrides, bytes) or not all(isinstance(override, str) for override in listed):
        raise RecipeError(f"Overrides are texts such as 'train.lr=0.01', in a list, and not {overrides!r:.60}.")
    return listed


def _override(data: dict[str, Any], override: str) -> Key:
    """Carry `a.b=c` out on `data`, and return its path."""
    import yaml

    path, equals, text = override.partition("=")
    keys = tuple(key.strip() for key in path.split("."))
    if not equals or not all(keys):
        raise ValueError("isn't of the form section.key=value, as train.lr=0.01 is")
    if len(keys) > DEPTH:
        raise ValueError(f"names more than {DEPTH} sections, one in the other")
    try:
        value = parse_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"its value isn't YAML: {getattr(error, 'problem', None) or error}") from None
    section = data
    for key in keys[:-1]:
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            raise ValueError(f"{key} is no section, it is {section!r}")
    section[keys[-1]] = value
    return keys


def _line(file: RecipeFile, overridden: Mapping[Key, str], key: Key, message: str) -> str:
    for path, override in overridden.items():
        # The override set this key, a section around it, or a key in it.
        if key and (key[: len(path)] == path or path[: len(key)] == key):
            return f"{override} (command line): {message}"
    line = file.document.line(key)
    where = f" (line {line})" if line else ""
    return f"{'.'.join(map(str, key))}{where}: {message}" if key else message


def _problems(model: type[BaseModel], error: ValidationError, data: Any) -> Iterator[tuple[Key, str]]:
    for problem in error.errors():
        location = _in_data(problem["loc"], data)
        yield location, _message(model, problem, location)


def _in_data(location: Key, data: Any) -> Key:
    """The location without the names of a union's members, which pydantic appends."""
    for length, key in enumerate(location):
        if isinstance(data, dict) and isinstance(key, str):
            if key not in data and length < len(location) - 1:
                return location[:length]
            data = data.get(key)
        elif isinstance(data, list) and isinstance(key, int) and key < len(data):
            data = data[key]
        else:
            return location[:length]
    return location


def _message(model: type[BaseModel], error: Mapping[str, Any], location: Key) -> str:
    kind, message = error["type"], error["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return "unknown key" + _suggestion(model, location)
    if kind == "missing":
        return "missing"
    if kind == "value_error":
        return message
    value = error["input"]
    shown = "a mapping" if isinstance(value, dict) else json.dumps(value) if value is not None else "null"
    if kind == "literal_error" and isinstance(value, str):
        near = difflib.get_close_matches(value, _choices(model, location), n=1, cutoff=0.5)
        message += f" (did you mean {near[0]!r}?)" if near else ""
    return f"{message[0].lower()}{message[1:]}, not {shown}" if location else message


def _suggestion(model: type[BaseModel], location: Key) -> str:
    *parents, key = location
    section = _annotation(model, parents)
    names = list(section.model_fields) if _is_model(section) else []
    near = difflib.get_close_matches(str(key), names, n=1)
    if near:
        return f"; did you mean {'.'.join([*map(str, parents), near[0]])}?"
    elsewhere = [
        f"{name}.{key}"
        for name in model.model_fields
        if _is_model(other := _annotation(model, [name])) and key in other.model_fields
    ]
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    return f"; the keys here are {', '.join(names)}" if names else ""


def _choices(model: type[BaseModel], location: Key) -> list[str]:
    annotation = _annotation(model, location)
    return [choice for choice in get_args(annotation) if isinstance(choice, str)]


def _annotation(model: Any, location: Sequence[str | int]) -> Any:
    """The type of the key at a path: a model class, a Literal or any other type; None if there is no such key."""
    for key in location:
        if isinstance(key, int):
            model = next(iter(get_args(model)), None)
        else:
            model = model.model_fields[key].annotation if _is_model(model) and key in model.model_fields else None
        if get_origin(model) in (Union, types.UnionType):
            members = [member for member in get_args(model) if _is_model(member) or get_origin(member) is Literal]
            model = members[0] if members else model
    return model


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
