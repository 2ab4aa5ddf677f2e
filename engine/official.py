"""Official checkpoints under our names: rules for the names of their tensors, and sizes from their shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count

from torch import Tensor

from engine.errors import UserError

# Each a pattern and what replaces it, as `re.sub` takes them; None leaves out the tensors whose names match.
Rules = Iterable[tuple[str, str | Callable[[re.Match[str]], str] | None]]


def rename(name: str, rules: Rules) -> str | None:
    """Apply rules to a name, one after another. None: its tensor is left out."""
    for pattern, replacement in rules:
        if replacement is None and re.search(pattern, name):
            return None
        name = name if replacement is None else re.sub(pattern, replacement, name)
    return name


def rename_all(state: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Return tensors under other names, without those that a rule leaves out."""
    names = {key: rename(key, rules) for key in state}
    return {names[key]: value for key, value in state.items() if names[key] is not None}


def numbered(state: Mapping[str, Tensor], pattern: str, first: int = 0) -> list[Tensor]:
    """Return the tensors `pattern.format(i)` for i from `first` on, up to the first that is missing."""
    end = next(i for i in count(first) if pattern.format(i) not in state)
    return [state[pattern.format(i)] for i in range(first, end)]


def strides(state: Mapping[str, Tensor], pattern: str) -> tuple[int, ...]:
    """Return the strides of the blocks 1, 2, ...: half the kernel of their re-sampling convolution."""
    return tuple(kernel.shape[-1] // 2 for kernel in numbered(state, pattern, 1))


@contextmanager
def sizes_of(what: str) -> Iterator[None]:
    """Raise UserError where the block, which reads sizes off tensors, meets a checkpoint that is not `what`."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"not {what}: it has no tensor {error}") from error
    except (ValueError, IndexError) as error:
        raise UserError(f"not {what}: a tensor has another rank ({error})") from error
