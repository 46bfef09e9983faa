"""Settings: NamedTuples that are the groups of a config, and one check of all of them.

    class Smoothing(NamedTuple):
        amount: Annotated[float, between(0, 1)] = 0.0  # that all classes have alike

A function takes the NamedTuple, and a config holds its fields under the same names. So
the class is the one place where a setting's meaning, default and valid values stand.
What no single field can tell, a method `check(self)` does, by raising a ValueError.
"""

import difflib
import math
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, NamedTuple, TypeVar, get_args, get_origin

import numpy as np

Kind = TypeVar("Kind", bound=tuple)
# New names of settings by those of before: older runs and habits know these.
MOVED = {"schedule": "schedule.kind"} | {
    name: f"{group}.{name}"
    for group, names in {
        "schedule": "learning_rate warmup_epochs drop_factor drop_epochs "
        "plateau_epochs plateau_improvement plateau_drops",
        "optimizer": "momentum nesterov weight_decay label_smoothing",
        "inputs": "mean scale color_sigma statistics_images",
    }.items()
    for name in names.split()
}
_NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}


class Valid(NamedTuple):
    """Which values a field may have, on top of its type."""

    low: float = -math.inf
    high: float = math.inf
    low_in: bool = True
    high_in: bool = True
    choices: tuple[str, ...] = ()

    def fault(self, value: Any) -> str:
        """What a value should be and is not; "" for a valid one."""
        if self.choices:
            if value in self.choices:
                return ""
            close = difflib.get_close_matches(str(value), self.choices, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            return f"one of {', '.join(self.choices)}{hint}"
        above = value >= self.low if self.low_in else value > self.low
        below = value <= self.high if self.high_in else value < self.high
        if above and below:
            return ""
        words = [
            ("at least" if self.low_in else "more than", self.low),
            ("at most" if self.high_in else "less than", self.high),
        ]
        return " and ".join(f"{w} {_number(b)}" for w, b in words if math.isfinite(b))


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


def at_least(low: float) -> Valid:
    """Numbers from `low` on."""
    return Valid(low)


def above(low: float) -> Valid:
    """Numbers above `low`."""
    return Valid(low, low_in=False)


def between(low: float, high: float) -> Valid:
    """Numbers from `low` on, and below `high`."""
    return Valid(low, high, high_in=False)


def pixels(low: int = 1) -> Valid:
    """Sides of images in pixels, up to what image files can have."""
    return Valid(low, 2**15)


def helpers(low: int = 0) -> Valid:
    """Numbers of threads or processes."""
    return Valid(low, 1024)


def share(*, above_zero: bool = False) -> Valid:
    """Numbers from 0 to 1, both included; 0 itself not if `above_zero`."""
    return Valid(0, 1, low_in=not above_zero)


def one_of(choices: Iterable[str]) -> Valid:
    """One of these words."""
    return Valid(choices=tuple(choices))


def plain(settings: Any) -> dict[str, Any]:
    """Settings as dicts in dicts, as a config or a JSON file holds them."""
    return {
        name: plain(value) if hasattr(value, "_asdict") else value
        for name, value in settings._asdict().items()
    }


def read(kind: type[Kind], values: Mapping[str, Any], where: str = "config") -> Kind:
    """Settings from plain values by name; fields that are missing have their defaults.

    Lists become tuples, and whole numbers become floats where those are meant.

    `kind`: the NamedTuple. `where`: what to call the group in an error.

    Raises: ValueError for an unknown field, naming the known ones, and for a value of
    another type, that isn't finite, or that is out of its range.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be settings by name, got {values!r:.80}")
    hints = kind.__annotations__
    for name in map(str, values):
        if name not in hints:
            raise ValueError(unknown_field(kind, name, where))
    make: Any = kind
    settings = make(
        **{n: _read_value(hints[n], v, f"{where}.{n}") for n, v in values.items()}
    )
    if hasattr(settings, "check"):
        try:
            settings.check()
        except ValueError as error:
            named = where in str(error)
            raise ValueError(str(error) if named else f"{where}: {error}") from None
    return settings


def unknown_field(kind: Any, path: str, where: str = "config") -> str:
    """What to say of a dotted name that settings don't have; "" of one they have."""
    known = dict(fields_of(kind))
    if path in known:
        return ""
    if any(name.startswith(f"{path}.") for name in known):
        fields = ", ".join(n for n in known if n.startswith(f"{path}."))
        return f"{where}.{path} is a group of settings: set one of {fields}"
    if MOVED.get(path) in known:
        return f"unknown field {path!r}: it is now {where}.{MOVED[path]}"
    *groups, name = path.split(".")
    inner = kind
    for depth, group in enumerate(groups):
        if group not in inner._fields:
            return unknown_field(kind, ".".join(groups[: depth + 1]), where)
        inner = _group(inner.__annotations__[group])
        if inner is None:
            return f"{where}.{'.'.join(groups)} is no group: it has no field {name!r}"
    close = [one for one in known if one.rpartition(".")[2] == name]
    close += difflib.get_close_matches(path, known, n=2, cutoff=0.75)
    hint = f"; did you mean {' or '.join(dict.fromkeys(close))}?" if close else ""
    place = ".".join([where, *groups])
    fields = ", ".join(inner._fields)
    return f"unknown field {name!r}: {place} has the fields {fields}{hint}"


def fields_of(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted names of all fields, those of groups among them, with their types."""
    for name, hint in kind.__annotations__.items():
        group = _group(hint)
        if group is None:
            yield f"{prefix}{name}", hint
        else:
            yield from fields_of(group, f"{prefix}{name}.")


def at_new_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a file of before, those that have `MOVED` at their new names."""
    known = dict(values)
    for old, new in MOVED.items():
        group, name = new.split(".")
        if old in known and not isinstance(known[old], Mapping):
            value = known.pop(old)
            known[group] = {**known.get(group, {}), name: value}
    return known


def _group(hint: Any) -> Any:
    """The NamedTuple that a field is a group of; None for a single value."""
    return hint if hasattr(hint, "_fields") else None


def _read_value(hint: Any, value: Any, where: str) -> Any:
    group = _group(hint)
    if group is not None:
        if not isinstance(value, Mapping):
            fields = ", ".join(f"{where}.{name}" for name in group._fields)
            raise ValueError(f"{where} is a group of settings, {fields}; got {value!r}")
        return read(group, value, where)
    valid = Valid()
    if get_origin(hint) is Annotated:
        hint, valid = get_args(hint)
    if get_origin(hint) is tuple:
        return _read_tuple(get_args(hint), value, where)
    kinds = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, np.generic):
        value = value.item()
    if float in kinds and type(value) is int:
        value = float(value) if abs(value) < 1e300 else math.inf
    if type(value) not in kinds:
        wanted = " or ".join(_NAMES[kind] for kind in kinds)
        raise ValueError(f"{where} must be {wanted}, got {value!r}")
    if type(value) is float and not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number, got {value}")
    if type(value) is float and value and not 1e-37 < abs(value) < 1e38:
        raise ValueError(
            f"{where} must be 0, or a number that float32 has, from 1e-37 to 1e38, got "
            f"{value}"
        )
    if type(value) is int and value >= 2**31 and valid.high == math.inf:
        raise ValueError(f"{where} must be at most 2,147,483,647, got {value!r:.30}")
    fault = valid.fault(value) if valid != Valid() else ""
    if fault:
        raise ValueError(f"{where} must be {fault}, got {value!r}")
    return value


def _read_tuple(hints: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list):
        raise ValueError(f"{where} must be a tuple such as (1, 2), got {value!r}")
    if len(hints) == 2 and hints[1] is Ellipsis:
        hints = (hints[0],) * len(value)
    if len(hints) != len(value):
        raise ValueError(f"{where} must be a tuple of {len(hints)}, got {value!r}")
    return tuple(
        _read_value(hint, part, f"each part of {where}")
        for hint, part in zip(hints, value, strict=True)
    )
