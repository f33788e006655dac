"""A row of the comparison: a method and the options that make it differ from the others.

::

    l2-sp+l1                                 a method as `afds fit --method` takes it
    afds[distillation.afd=0,optim.lr=0.01]   the same with options of `fit`
    "AFD off" = "afds[distillation.afd=0]"   a row with a name, in a TOML file under [rows], or a JSON object
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afds.config import FitConfig, from_json, parse_method, to_json
from afds.errors import ConfigError

# What the comparison itself decides; a row may not.
FIXED = ("data", "out", "resume", "budget", "method", "seed", "source", "arch_args", "teacher", "anchor", "read_test",
         "base_epochs", "latency", "hardware", "data_options.input_size", "data_options.val_fraction",
         "data_options.test_fraction", "data_options.skip_unreadable")  # fmt: skip
_ROW = re.compile(r"\s*([A-Za-z0-9+-]+)\s*(?:\[(.*)\])?\s*", re.DOTALL)


@dataclass(frozen=True)
class Row:
    """One line of the table for each budget."""

    name: str
    method: str
    overrides: tuple[tuple[str, Any], ...] = ()

    @property
    def slug(self) -> str:
        """For folder names; with a digest where names that differ would else be one: long ones, other alphabets."""
        short = re.sub(r"[^A-Za-z0-9.+-]+", "_", self.name).strip("_")
        if not short.strip("."):  # the folder above, or this one
            short = ""
        if self.name.isascii() and 0 < len(short) <= 80:
            return short
        return f"{short[:71]}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}".lstrip("-")

    def apply(self, config: FitConfig) -> FitConfig:
        """The options of a fit with this row's method and options."""
        return override(dataclasses.replace(config, method=self.method), dict(self.overrides), self.name)


def parse_row(text: str, name: str | None = None) -> Row:
    """Read `METHOD` or `METHOD[option=value,...]`.

    Raises:
        ConfigError: an unknown method or option, a value of the wrong kind; it names the row.
    """
    match = _ROW.fullmatch(text)
    if not match:
        raise ConfigError(f"Cannot read the method {text!r}: write METHOD or METHOD[option=value,option=value].")
    parse_method(match[1])
    overrides = []
    for part in filter(None, (p.strip() for p in (match[2] or "").split(","))):
        option, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"{text}: {part!r} should be option=value, such as distillation.afd=0.")
        overrides.append((option.strip().replace("-", "_"), _value(value.strip())))
    if "small_source" in dict(overrides) and "small" not in parse_method(match[1])[1]:
        raise ConfigError(f"{text}: small_source has no effect without +small, such as l2+small.")
    row = Row(name or text.strip(), match[1], tuple(overrides))
    try:
        row.apply(FitConfig())
    except ConfigError as error:
        if str(error).startswith(row.name):
            raise
        raise ConfigError(f"{row.name}: {error}") from error
    return row


def read_rows(path: Path) -> list[Row]:
    """Named rows of a TOML file ([rows], name = "METHOD[...]") or of a JSON object.

    Raises:
        ConfigError: it names the file and the row.
    """
    try:
        text = path.read_text(encoding="utf-8")
        is_json = path.suffix == ".json"
        values = json.loads(text, object_pairs_hook=_each_once) if is_json else tomllib.loads(text).get("rows")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--rows {path}: cannot be read ({error}).") from error
    if not isinstance(values, dict) or not values or not all(isinstance(v, str) for v in values.values()):
        raise ConfigError(f'--rows {path}: give lines such as "AFD off" = "afds[distillation.afd=0]" under [rows].')
    return [parse_row(value, name) for name, value in values.items()]


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """As TOML has it: JSON would take the last of two rows of one name."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"{max(names, key=names.count)!r} is there twice")
    return dict(pairs)


def override(config: FitConfig, values: dict[str, Any], where: str) -> FitConfig:
    """``config`` with options replaced by their dotted names.

    Raises:
        ConfigError: an unknown option, one that the comparison decides, a value of the wrong kind.
    """
    plain = to_json(config)
    for option, value in values.items():
        *groups, last = option.split(".")
        place = plain
        for group in groups:
            place = place.get(group) if isinstance(place, dict) else None
        if not isinstance(place, dict) or last not in place or isinstance(place[last], dict):
            raise ConfigError(f"{where}: there is no option {option!r}; `afds fit --help` lists them.")
        if option in FIXED or option.partition(".")[0] in FIXED:
            raise ConfigError(f"{where}: {option} is the same for all rows of a comparison.")
        place[last] = value
    result: FitConfig = from_json(FitConfig, plain, where)
    return result


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
