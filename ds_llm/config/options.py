"""Typed options: a dataclass whose fields have a help text and bounds, read from YAML and `key=value` overrides.

`key(default, help, ...)` declares a field; a field that is itself such a dataclass is a section. OmegaConf merges the
file and the overrides over the defaults, so unknown keys and wrong types are errors; `load` also checks bounds and
choices. Every error is a `ConfigError` of one line that names the key, and the nearest known key for an unknown one. A
field of type `Any` takes any value, mappings too.

A value may refer to another key, `${data.train}`. OmegaConf's resolvers, such as `${oc.env:NAME}`, work only on the
command line: a file by somebody else must not read the environment, whose secrets would be saved with the run.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ds_llm.errors import ConfigError, first_line

MOST_LEVELS, MOST_VALUES = 50, 100_000  # limits of a configuration file
RESOLVER = re.compile(r"\$\{(?![\w.\[\]]*\})")  # an interpolation with more than the name of a key


def key(
    default, help: str, *, choices: tuple = (), at_least: float | None = None, below: float | None = None, **bounds
):
    """A documented field. `at_least`, `above`, `at_most`, `below` bound a number. `choices` lists the allowed values
    of the field, or of the elements of a list."""
    meta = {"help": help, "choices": choices, "at_least": at_least, "below": below, **bounds}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=meta)
    return field(default=default, metadata=meta)


def fields(cls, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Dotted name of every leaf key -> its dataclass field, in the order of declaration."""
    found = {}
    defaults = cls()
    for f in dataclasses.fields(cls):
        value = getattr(defaults, f.name)
        if dataclasses.is_dataclass(value):
            found.update(fields(type(value), f"{prefix}{f.name}."))
        else:
            found[prefix + f.name] = f
    return found


def load(cls, path: str | None = None, overrides: list[str] = ()):
    """Merge the defaults of `cls`, the YAML file at `path` and `key=value` overrides; check; return an object of `cls`.

    Raises `ConfigError` for an unreadable file, an unknown key, a wrong type or an impossible value.
    """
    merged = OmegaConf.structured(cls)
    if path is not None:
        merged = _merge(cls, merged, [_read_yaml(path)], path)
    merged = _merge(cls, merged, [_read_override(text) for text in overrides], "command line")
    try:
        found = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'configuration'}: {first_line(error)}") from None
    check(found)
    return found


def check(found) -> None:
    """Raise `ConfigError` for the first value that is not among its field's choices or outside of its bounds."""
    for name, f in fields(type(found)).items():
        value = found
        for part in name.split("."):
            value = getattr(value, part)
        check_value(name, value, f)


def check_value(name: str, value, declared: dataclasses.Field) -> None:
    """Raise `ConfigError` that begins with `name` for a value that the declared field does not allow."""
    meta = declared.metadata
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, str) and "\0" in one:
            raise ConfigError(f"{name}: {one!r} holds a NUL character")
        if meta["choices"] and one not in meta["choices"]:
            text = ", ".join(str(c) for c in meta["choices"])
            near = difflib.get_close_matches(str(one), [str(c) for c in meta["choices"]], n=1)
            raise ConfigError(
                f"{name}: {one!r} is not one of {text}" + (f"; did you mean '{near[0]}'?" if near else "")
            )
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        _check_number(name, value, meta)


def _check_number(name: str, value: float, bounds: Mapping) -> None:
    if not math.isfinite(value):
        raise ConfigError(f"{name}: {value} is not a finite number")
    low, high = bounds.get("at_least"), bounds.get("at_most")
    if low is not None and high is not None and not low <= value <= high:
        raise ConfigError(f"{name}: {value} must be between {low:g} and {high:g}")
    for bound, holds, text in (
        ("at_least", operator.ge, "at least"),
        ("above", operator.gt, "greater than"),
        ("at_most", operator.le, "at most"),
        ("below", operator.lt, "less than"),
    ):
        limit = bounds.get(bound)
        if limit is not None and not holds(value, limit):
            raise ConfigError(f"{name}: {value} must be {text} {limit:g}")


def to_dict(found) -> dict:
    """The options as a plain nested dictionary, for YAML and JSON."""
    return dataclasses.asdict(found)


def to_yaml(found) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(found))


def flatten(cls, values: dict) -> dict:
    """Dotted names -> values of a nested dictionary. The value of a field of type `Any` stays whole."""
    whole = {name for name, f in fields(cls).items() if f.type == "Any"}
    flat = {}

    def walk(node: dict, prefix: str) -> None:
        for name, value in node.items():
            if isinstance(value, dict) and value and prefix + str(name) not in whole:
                walk(value, f"{prefix}{name}.")
            else:
                flat[prefix + str(name)] = value

    walk(values, "")
    return flat


def markdown(cls) -> str:
    """The table of all keys, as in docs/configuration.md."""
    lines = ["| key | default | meaning |", "| --- | --- | --- |"]
    defaults = OmegaConf.structured(cls)
    for name, f in fields(cls).items():
        value = OmegaConf.select(defaults, name)
        shown = "none" if value is None else str(list(value) if isinstance(value, ListConfig) else value)
        choices = f" ({', '.join(map(str, f.metadata['choices']))})" if f.metadata["choices"] else ""
        lines.append(f"| `{name}` | `{shown}` | {f.metadata['help']}{choices} |")
    return "\n".join(lines)


def _read_yaml(path: str) -> DictConfig:
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such configuration file")
    loaded = load_yaml(path)
    if isinstance(loaded, ListConfig):
        raise ConfigError(f"{path}: must hold keys and values, not a list")
    for name, text in _texts(OmegaConf.to_container(loaded)):
        if RESOLVER.search(text):
            raise ConfigError(
                f"{path}: {name}: {text!r}: in a file only the name of a key stands in ${{...}}; "
                "give what comes from the environment on the command line"
            )
    return loaded


def load_yaml(path: str) -> DictConfig | ListConfig:
    """The content of a YAML file, read by a safe loader that refuses object tags.

    Raises `ConfigError` for a file that is not YAML, and for nesting or aliases without end, which would crash the
    loader or never finish.
    """
    try:
        _check_shape(Path(path).read_text(encoding="utf-8"))
        return OmegaConf.load(path)
    except Exception as error:  # the YAML and OmegaConf errors share no base class
        mark = getattr(error, "problem_mark", None)
        reason = f"line {mark.line + 1}: {error.problem}" if mark else first_line(error)
        raise ConfigError(f"{path}: not a readable YAML file ({reason})") from None


def _check_shape(text: str) -> None:
    sizes, names, anchored = [0], [], {}  # values so far of each collection that is open; sizes of what aliases repeat
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            sizes.append(1)
            names.append(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            size = sizes.pop()
            anchored[names.pop()] = size
            sizes[-1] += size
        elif isinstance(event, yaml.NodeEvent):
            sizes[-1] += anchored.get(event.anchor, 1) if isinstance(event, yaml.AliasEvent) else 1
        if len(sizes) > MOST_LEVELS or sizes[-1] > MOST_VALUES:
            raise ValueError(f"more than {MOST_LEVELS} levels or {MOST_VALUES:,} values")


def _texts(value, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested mappings and lists, with its dotted name."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(inner, f"{name}.{key}" if name else str(key))


def _read_override(text: str) -> DictConfig:
    name, found, value = text.partition("=")
    if not found or not name:
        raise ConfigError(f"'{text}' is not an override: write key=value, for example optim.lr=1e-3")
    try:
        return OmegaConf.from_dotlist([text])
    except Exception as error:  # YAML errors of the value have no common base class
        raise ConfigError(f"{name}: cannot read the value {value!r} ({first_line(error)})") from None


def _merge(cls, base: DictConfig, updates: list[DictConfig], where: str) -> DictConfig:
    """`updates`, in turn, merged over `base` in one call: each merge copies `base`, which takes most of the time."""
    known = fields(cls)
    sections = {k.rsplit(".", depth)[0] for k in known for depth in range(1, k.count(".") + 1)}
    for update in updates:
        for name, value in flatten(cls, OmegaConf.to_container(update)).items():
            if name in sections:
                raise ConfigError(
                    f"{where}: '{name}' is a section: set one of its keys, for example {name}.{_first_key(name, known)}"
                )
            if name not in known:
                raise ConfigError(f"{where}: unknown key '{name}'{_nearest(name, known)}")
            if known[name].type == "list[str]" and isinstance(value, str):
                OmegaConf.update(update, name, [value])
    try:
        return OmegaConf.merge(base, *updates)
    except OmegaConfBaseException as error:
        name = error.full_key or ""
        raise ConfigError(f"{where}: {name}: {first_line(error)}") from None


def _first_key(section: str, known) -> str:
    return next(k for k in known if k.startswith(section + "."))[len(section) + 1 :]


def _nearest(name: str, known) -> str:
    last = name.rsplit(".", 1)[-1]
    by_last = [k for k in known if k.rsplit(".", 1)[-1] == last]
    close = by_last or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close:
        close = [k for k in known if difflib.get_close_matches(last, [k.rsplit(".", 1)[-1]], cutoff=0.7)]
    return f"; did you mean '{close[0]}'?" if close else "; --print-config lists all keys"
