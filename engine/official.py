"""Conversion of upstream checkpoints: rules for renaming tensors, and configs inferred from tensor shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count

from torch import Tensor

from engine.errors import UserError

# Pairs of pattern and replacement for `re.sub`. A replacement of None removes matching tensors.
Rules = Iterable[tuple[str, str | Callable[[re.Match[str]], str] | None]]


def rename(name: str, rules: Rules) -> str | None:
    """Apply the rules to a name in order. Return None if the tensor is removed."""
    for pattern, replacement in rules:
        if replacement is None and re.search(pattern, name):
            return None
        name = name if replacement is None else re.sub(pattern, replacement, name)
    return name


def rename_all(state: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Rename the tensors of a state dict and drop those that a rule removes."""
    names = {key: rename(key, rules) for key in state}
    return {names[key]: value for key, value in state.items() if names[key] is not None}


def numbered(state: Mapping[str, Tensor], pattern: str, first: int = 0) -> list[Tensor]:
    """Return the tensors `pattern.format(i)` for i = `first`, `first` + 1, ... until one is missing."""
    end = next(i for i in count(first) if pattern.format(i) not in state)
    return [state[pattern.format(i)] for i in range(first, end)]


def strides(state: Mapping[str, Tensor], pattern: str) -> tuple[int, ...]:
    """Return the strides of blocks 1, 2, ...: half the kernel size of their resampling convolution."""
    return tuple(kernel.shape[-1] // 2 for kernel in numbered(state, pattern, 1))


@contextmanager
def sizes_of(what: str) -> Iterator[None]:
    """Convert errors in the block, which infers sizes from tensors, to a UserError: the checkpoint is not `what`."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"not {what}: tensor {error} is missing") from error
    except (ValueError, IndexError) as error:
        raise UserError(f"not {what}: a tensor has another rank ({error})") from error
