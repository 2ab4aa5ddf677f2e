"""Seeds derived from names and numbers, so that a resumed run needs no stored random state."""

from __future__ import annotations

import hashlib

import torch


def seed_for(*names: str | int) -> int:
    """Return a 63-bit seed that is a function of the names and their order."""
    return int.from_bytes(hashlib.blake2b(repr(names).encode(), digest_size=8).digest(), "big") >> 1


def generator_for(*names: str | int) -> torch.Generator:
    """Return a CPU generator seeded by `seed_for(*names)`."""
    return torch.Generator().manual_seed(seed_for(*names))
