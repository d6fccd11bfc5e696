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
class Source:
    """A file, its contents, and the changes that the command line makes."""

    path: Path
    document: Document
    overrides: Sequence[str] = ()


def validated(model: type[M], source: Source) -> M:
    """Make a `model` of what the file says, with its overrides.

    Raises:
        RecipeError: lists everything that is wrong.
    """
    data = source.document.data
    lines = [_line(source, {}, key, message) for key, message in source.document.problems]
    problems: list[tuple[Key, str]] = []
    overridden: dict[Key, str] = {}
    for override in overrides_of(source.overrides):
        try:
            overridden[_override(data, override)] = override
        except ValueError as error:
            problems.append(((override,), str(error)))
            overridden[(override,)] = override
    try:
        # Strict, from JSON: "3" is no number and true is none either, but a list may become a tuple.
        made = model.model_validate_json(json.dumps(data), strict=True)
        if not problems and not lines:
            return made
    except ValidationError as error:
        problems += _problems(model, error, data)
    # A union reports each of its members.
    merged: dict[Key, list[str]] = {}
    for key, message in problems:
        merged.setdefault(key, []).append(message)
    lines += [_line(source, overridden, key, "; or ".join(messages)) for key, messages in merged.items()]
    count = f"{len(lines)} errors" if len(lines) > 1 else "an error"
    listed = "".join(f"\n  {line}" for line in lines)
    raise RecipeError(f"{source.path} has {count}:{listed}")


def overrides_of(given: Any) -> list[str]:
    """Overrides, such as "train.lr=0.01", as a list.

    Raises:
        RecipeError: they are no texts.
    """
    listed = list(given) if isinstance(given, Iterable) and not isinstance(given, str | bytes) else [given]
    if isinstance(given, bytes) or not all(isinstance(each, str) for each in listed):
        raise RecipeError(f"Overrides are texts such as 'train.lr=0.01', in a list, and not {given!r:.60}.")
    return listed


def _override(data: dict[str, Any], override: str) -> Key:
    """Carry `a.b=c` out on `data`, and return its path."""
    import yaml

    path, equals, text = override.partition("=")
    keys = tuple(part.strip() for part in path.split("."))
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


def _line(source: Source, overridden: Mapping[Key, str], key: Key, message: str) -> str:
    for path, override in overridden.items():
        # The key itself, a part of it, or a section that it changed.
        if key and (key[: len(path)] == path or path[: len(key)] == key):
            return f"{override} (command line): {message}"
    line = source.document.line(key)
    where = f" (line {line})" if line else ""
    return f"{'.'.join(map(str, key))}{where}: {message}" if key else message


def _problems(model: type[BaseModel], error: ValidationError, data: Any) -> Iterator[tuple[Key, str]]:
    for each in error.errors():
        location = _in_data(each["loc"], data)
        yield location, _message(model, each, location)


def _in_data(location: Key, data: Any) -> Key:
    """Cut off the names of a union's members, which pydantic appends to the path."""
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
    given = error["input"]
    shown = "a mapping" if isinstance(given, dict) else json.dumps(given) if given is not None else "null"
    if kind == "literal_error" and isinstance(given, str):
        near = difflib.get_close_matches(given, _choices(model, location), n=1, cutoff=0.5)
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
    """The type at a path: a model class, a Literal, or whatever it is; None where there is none."""
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
