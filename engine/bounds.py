"""Bounds of settings: stated once, beside each field of a dataclass, and checked before anything is allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from engine.errors import UserError

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")
SEEDS = (0, 2**63 - 1)  # that torch can be seeded with


def bounded(low: float, high: float, **field: Any) -> Any:
    """A dataclass field with values from `low` to `high`, whole numbers if both are; `field` as for dataclasses."""
    return dataclasses.field(metadata={"bounds": (low, high)}, **field)


def require_range(name: str, value: Any, low: float, high: float) -> None:
    """
    Raises:
        UserError: `value` is no number from `low` to `high`.
    """
    kinds = (int,) if isinstance(low, int) and isinstance(high, int) else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value <= high:
        kind = "a whole number" if kinds == (int,) else "a number"
        raise UserError(f"{name}={str(value)[:40]} must be {kind} from {low:,} to {high:,}")


def require_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """
    Raises:
        UserError: `value` is none of the choices.
    """
    if value not in choices:
        raise UserError(f"{name}={value} is unknown; choose {', '.join(choices)}")


def check_bounds(settings: Any, prefix: str = "") -> None:
    """Check all `bounded` fields of a dataclass, of a tuple every value, and that switches are true or false.

    None passes where the field's type allows it.

    Raises:
        UserError: with the first that is out of bounds, its name after `prefix`.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.type == "bool" and not isinstance(value, bool):
            raise UserError(f"{prefix}{field.name}={str(value)[:40]} must be true or false")
        if "bounds" not in field.metadata or (value is None and "None" in field.type):
            continue
        for number in value if field.type.startswith("tuple") and isinstance(value, list | tuple) else [value]:
            require_range(f"{prefix}{field.name}", number, *field.metadata["bounds"])
