"""Reads a recipe: YAML plus ``--set`` overrides, composed once into a dataclass of ``lexmae.config``."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lexmae.errors import InputError

_LARGEST = 100_000  # entries of a recipe
_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError, OverflowError, TypeError, AttributeError)
# What other trainers call our keys.
_OTHER_NAMES = {"learning_rate": "lr", "batch_size": "batch", "max_steps": "steps", "num_train_epochs": "epochs",
                "warmup_steps": "warmup", "warmup_ratio": "warmup", "max_grad_norm": "clip",
                "gradient_clipping": "clip", "model_name_or_path": "init", "output_dir": "output"}


def load(path: str | Path, kind: type, overrides: Sequence[str] = ()) -> Any:
    """Read a recipe of dataclass ``kind`` from YAML and apply ``key.sub=value`` overrides.

    Raises:
        InputError: unreadable file, unknown or missing key, or a value of the wrong type or range, with its line.
    """
    path = Path(path)
    values, lines = _read_yaml(path)
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key:
            raise InputError(f"--set {override}: key=value is needed")
        _assign(values, key.strip().split("."), _parse_value(override, text))
        lines = {where: line for where, line in lines.items() if where[:len(key.split("."))] != tuple(key.split("."))}
    return _build(kind, values, (), path, lines)


MACHINE = {"model": ("packing", "compile", "activation_checkpointing"), "optimization": ("micro_batch", "micro_tokens")}
"""Keys of training recipes that say how a machine computes, and not what is learned."""


def without(tree: Mapping[str, Any], keys: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """A recipe as ``to_dict`` gives it, less these keys of its sections."""
    return {name: {key: value for key, value in section.items() if key not in keys[name]} if name in keys else section
            for name, section in tree.items()}


def setting(key: str, text: str) -> str:
    """The override that gives ``key`` this text: as it is, or quoted where YAML would read it as something else."""
    try:
        plain = _values(text) == text
    except _NOT_YAML:
        plain = False
    quoted = yaml.safe_dump(text, default_style='"', allow_unicode=True, width=math.inf).rstrip("\n")
    return f"{key}={text if plain else quoted}"


def to_dict(recipe: Any) -> dict[str, Any]:
    """The composed recipe as plain values, for logs and manifests."""
    return dataclasses.asdict(recipe)


def dump(recipe: Any) -> str:
    """The composed recipe as YAML."""
    return yaml.safe_dump(_plain(to_dict(recipe)), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


class _Loader(yaml.SafeLoader):
    """YAML's safe loader with YAML 1.2's booleans: `off` is a word, so that `source: off` says what it shows."""


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag != _BOOL]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(_BOOL, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def _values(text: str) -> Any:
    """The plain values that a text in YAML holds."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[tuple, int]]:
    if not path.is_file():
        raise InputError("no such recipe", path)
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.compose(text, Loader=_Loader)
        values = _values(text)
    except _NOT_YAML as error:
        mark = getattr(error, "problem_mark", None)
        raise InputError(f"not YAML: {getattr(error, 'problem', None) or error}", path,
                         mark.line + 1 if mark else None) from error
    if not isinstance(values, dict):
        raise InputError("a recipe is a mapping of keys to values", path)
    lines: dict[tuple, int] = {}
    try:
        _collect_lines(tree, (), lines, path)
    except RecursionError as error:
        raise InputError("nested too deeply, or an alias stands inside what it names", path) from error
    return values, lines


def _collect_lines(node: yaml.Node, where: tuple, lines: dict[tuple, int], path: Path) -> None:
    if len(lines) > _LARGEST:  # a few aliases of aliases are enough for billions
        raise InputError(f"has more than {_LARGEST} entries once its aliases are written out", path)
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise InputError(f"{key.value}: given twice", path, line)
            seen.add(key.value)
            lines[(*where, key.value)] = line
            _collect_lines(value, (*where, key.value), lines, path)
    elif isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            lines[(*where, str(position))] = item.start_mark.line + 1
            _collect_lines(item, (*where, str(position)), lines, path)


def _parse_value(override: str, text: str) -> Any:
    try:
        return _values(text)
    except _NOT_YAML as error:
        raise InputError(f"--set {override}: the value is not YAML") from error


def _assign(values: Any, keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        at = _position(values, key, keys) if isinstance(values, list) else key
        inner = values[at] if isinstance(values, list) else values.get(at)
        if not isinstance(inner, (dict, list)):
            inner = values[at] = {}
        values = inner
    values[_position(values, keys[-1], keys) if isinstance(values, list) else keys[-1]] = value


def _position(values: list, key: str, keys: list[str]) -> int:
    if not key.isdigit() or int(key) >= len(values):
        raise InputError(f"--set {'.'.join(keys)}: {key} is not a position below {len(values)}")
    return int(key)


def _build(kind: type, values: Any, where: tuple, path: Path, lines: Mapping[tuple, int]) -> Any:
    def fail(reason: str, at: tuple) -> typing.NoReturn:
        prefix = ".".join(at)
        raise InputError(f"{prefix}: {reason}" if prefix else reason, path, lines.get(at))

    if not isinstance(values, Mapping):
        fail("a mapping of keys to values is needed", where)
    fields = {item.name: item for item in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in fields:
            fail(f"unknown key{_suggestion(str(key), kind)}; known are {', '.join(fields)}", (*where, str(key)))
    built = {}
    for name, item in fields.items():
        if name in values:
            built[name] = _convert(hints[name], values[name], (*where, name), path, lines, fail,
                                   None if item.default_factory is dataclasses.MISSING else item.default_factory())
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            fail(f"the key '{name}' is missing", where)
    try:
        return kind(**built)
    except InputError as error:
        key = error.reason.partition(":")[0].split(" or ")[0]
        at = (*where, key) if (*where, key) in lines else where
        prefix = ".".join((*where, ""))
        raise InputError(f"{prefix}{error.reason}", path, lines.get(at)) from error


def _suggestion(key: str, kind: type) -> str:
    """` (did you mean '…'?)` for a key that is written like a known one of this section or of a section within."""
    known = {path.rpartition(".")[2]: path for path in reversed(_paths(kind))}
    names = {**{other: known[own] for other, own in _OTHER_NAMES.items() if own in known}, **known}
    near = difflib.get_close_matches(key.lower(), names, 1, 0.7)
    return f" (did you mean '{names[near[0]]}'?)" if near else ""


def _paths(kind: type) -> list[str]:
    """All keys of a dataclass, those of its sections with the section before them."""
    found = []
    for name, hint in typing.get_type_hints(kind).items():
        found.append(name)
        if dataclasses.is_dataclass(hint):
            found += [f"{name}.{inner}" for inner in _paths(hint)]
    return found


def _convert(hint: Any, value: Any, where: tuple, path: Path, lines: Mapping, fail, default: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        if default is not None and isinstance(value, Mapping):  # a partial section keeps the section's own defaults
            value = {**dataclasses.asdict(default), **value}
        return _build(hint, value, where, path, lines)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        fitting = [a for a in arguments if (typing.get_origin(a) is tuple) == isinstance(value, (list, tuple))]
        chosen = next(a for a in (*fitting, *arguments) if a is not types.NoneType)
        return _convert(chosen, value, where, path, lines, fail, None)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            fail("a list is needed", where)
        return tuple(_convert(arguments[0], item, (*where, str(i)), path, lines, fail, None)
                     for i, item in enumerate(value))
    if origin is not None:  # Mapping
        if not isinstance(value, Mapping):
            fail("a mapping of keys to values is needed", where)
        return dict(value)
    return _scalar(hint, value, where, fail)


def _scalar(hint: type, value: Any, where: tuple, fail) -> Any:
    if hint is float:
        try:
            number = float(value) if not isinstance(value, bool) else math.nan
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        return number if math.isfinite(number) else fail(f"a number is needed, not {value!r}", where)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if type(value) is str and ("\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value)):
        fail(f"text is needed, not {value!r}", where)
    if type(value) is not hint:
        names = {int: "a whole number", bool: "true or false", str: "text"}
        fail(f"{names.get(hint, hint.__name__)} is needed, not {value!r}", where)
    return value
