"""Skips training steps whose loss or gradient is not finite or far above its usual value."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError

SETTLED = 100  # steps before spikes are looked for
DECAY = 0.99  # of the running means
NAMES = ("loss", "grad_norm")


@dataclass(frozen=True)
class Skipped:
    """A step that was left out: its first part that was not good, why, the losses of this process's batches, their
    samples' keys where they have some, and how many in a row it is."""

    step: int
    part: str
    reason: str
    losses: list[float]
    keys: list[list[str]]
    in_a_row: int

    def batches(self, rank: int, numbers: Iterable[int], samples: Iterable[list[int]]) -> list[dict[str, Any]]:
        """This process's batches, with their numbers and the indices of their samples, as JSON can hold them."""
        return [
            {"rank": rank, "batch": number, "loss": loss if isfinite(loss) else str(loss), "samples": indices}
            | ({"keys": keys} if keys else {})
            for number, loss, indices, keys in zip_longest(numbers, self.losses, samples, self.keys)
        ]


class StepGuard:
    """Decides which steps are skipped, counts those skipped in a row, and records their batches.

    Decisions are tensors on the device of the figures, so that no step waits for them; `settle` reads what they were.
    All processes must give the same figures, so that they decide alike. Its state goes into checkpoints.

    Args:
        run: folder of the run; `bad_batches.jsonl` in it gets a line for each skipped step.
        spike: a loss or gradient norm above its running mean by more than `spike` running mean absolute deviations
            is a spike. None: finite values are never spikes.
        parts: of the task, each with running means of its own.
    """

    def __init__(self, run: Path, spike: float | None, parts: Iterable[str], device: torch.device | str = "cpu"):
        self.path, self.spike = run / "bad_batches.jsonl", spike
        self.skipped = self.in_a_row = 0
        zeros = torch.zeros(3, len(NAMES), dtype=torch.float64, device=device)
        self.figures = dict.fromkeys(parts, zeros)  # mean, mean absolute deviation, steps
        self._seen: list[tuple[int, str, Tensor, list[list[str]]]] = []

    def check(
        self, step: int, part: str, values: Tensor, finite: Tensor, losses: Tensor, keys: list[list[str]] | None = None
    ) -> Tensor:
        """Whether a part's step is good, () bool; then its values enter the running means.

        Args:
            values: (2,) loss and gradient norm, over all processes. finite: () bool, whether both were.
            losses: (n,) of this process's batches. keys: of their samples.
        """
        values, known = values.double(), self.figures[part]
        mean, spread, steps = known
        mean = torch.where(steps > 0, mean, values)
        good = finite
        if self.spike is not None:
            good = good & ~((steps >= SETTLED) & (values > mean + self.spike * spread)).any()
        about = torch.cat([torch.stack([good, finite]).double(), values, mean, spread, losses.double()])
        self._seen.append((step, part, about, keys or []))
        rate = (1 / (steps + 1)).clamp_min(1 - DECAY)  # a plain mean at first
        new_spread = spread + rate * ((values - mean).abs() - spread)
        new = torch.stack([mean + rate * (values - mean), new_spread, steps + 1])
        self.figures[part] = torch.where(good, new, known)
        return good

    def settle(self) -> list[Skipped]:
        """Steps skipped since the last call, which are counted now. Waits for the device."""
        found, seen = [], self._seen
        rows = torch.cat([about for _, _, about, _ in seen]).tolist() if seen else []
        self._seen, done = [], None
        for step, part, about, keys in seen:
            row, rows = rows[: len(about)], rows[len(about) :]
            if step == done:  # an earlier part of this step was not good
                continue
            if row[0]:
                self.in_a_row = 0 if part == seen[-1][1] else self.in_a_row
                continue
            done = step
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            found.append(Skipped(step, part, self._reason(*row[1:8]), row[8:], keys, self.in_a_row))
        return found

    def _reason(self, finite: float, *figures: float) -> str:
        if not finite:
            return "loss or gradient is not finite"
        values, means, spreads = figures[:2], figures[2:4], figures[4:]
        return " and ".join(
            f"{name} {value:.4g} is far above its running mean {mean:.4g} (usual deviation {spread:.2g})"
            for name, value, mean, spread in zip(NAMES, values, means, spreads)
            if value > mean + self.spike * spread
        )

    def write_down(self, skip: Skipped, batches: list[dict[str, Any]]) -> None:
        """Add a line about a skipped step and all processes' batches. Raises OSError."""
        record = {"step": skip.step, "part": skip.part, "reason": skip.reason, "batches": batches}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def state(self) -> dict[str, Any]:
        """For a checkpoint, after `settle`; waits for the device."""
        rows = {part: known.T.tolist() for part, known in self.figures.items()}
        figures = {f"{part}/{name}": row for part, found in rows.items() for name, row in zip(NAMES, found) if row[2]}
        return {"skipped": self.skipped, "skipped_in_a_row": self.in_a_row, "figures": figures}

    def load_state(self, state: dict[str, Any]) -> None:
        """
        Raises:
            UserError: `state` is not what `state()` gave.
        """
        try:
            self.skipped, self.in_a_row = int(state["skipped"]), int(state["skipped_in_a_row"])
            for part, known in self.figures.items():
                rows = [state["figures"].get(f"{part}/{name}", [0.0] * 3) for name in NAMES]
                self.figures[part] = known.new_tensor([[float(x) for x in row] for row in rows]).T.contiguous()
                if self.figures[part].shape != known.shape:
                    raise ValueError(rows)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"the checkpoint's count of skipped steps is damaged ({error!r})") from error
