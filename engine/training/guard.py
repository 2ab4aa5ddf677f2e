"""Skips training steps whose loss or gradient is not finite."""

from __future__ import annotations

import json
from itertools import groupby
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.errors import UserError

REASON = "loss or gradient is not finite"


class Skipped(NamedTuple):
    """A skipped step: its first part that was not finite, losses and samples' keys of this process's batches."""

    step: int
    part: str
    losses: list[float]
    keys: list[list[str]]
    in_a_row: int


class StepGuard:
    """Counts skipped steps, also those in a row, and records their batches.

    Whether a step is finite stays on the device, so that no step waits for it, until `settle` reads it. All processes
    must give the same answer, so that they count alike. The counts go into checkpoints.

    Args:
        run: folder of the run; `bad_batches.jsonl` in it gets a line for each skipped step.
    """

    def __init__(self, run: Path):
        self.path = run / "bad_batches.jsonl"
        self.skipped = self.in_a_row = 0
        self._checked: list[tuple[int, str, Tensor, list[list[str]]]] = []

    def check(self, step: int, part: str, finite: Tensor, losses: Tensor, keys: list[list[str]]) -> None:
        """Take note of a part's step.

        Args:
            finite: () bool, whether loss and gradient norm are finite in all processes; if not, the step is skipped.
            losses: (n,) of this process's batches. keys: of their samples.
        """
        self._checked.append((step, part, torch.cat([finite.double()[None], losses.double()]), keys))

    def settle(self) -> list[Skipped]:
        """Count and return the steps skipped since the last call. Synchronises with the device."""
        skips, checked, self._checked = [], self._checked, []
        rows = [row for _, _, row, _ in checked]
        rows = torch.cat(rows).cpu().split([len(row) for row in rows]) if rows else ()  # one copy
        for step, parts in groupby(zip(checked, rows), key=lambda entry: entry[0][0]):
            refused = [(part, row[1:].tolist(), keys) for (_, part, _, keys), row in parts if not row[0]]
            self.in_a_row = self.in_a_row + 1 if refused else 0
            if refused:
                self.skipped += 1
                skips.append(Skipped(step, *refused[0], self.in_a_row))
        return skips

    def write_down(self, skip: Skipped, batches: list[dict[str, Any]]) -> None:
        """Add a line about a skipped step and all processes' batches. Raises OSError."""
        batches = [b | {"loss": b["loss"] if isfinite(b["loss"]) else str(b["loss"])} for b in batches]
        line = {"step": skip.step, "part": skip.part, "reason": REASON, "batches": batches}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def state(self) -> dict[str, int]:
        """Return the counts for a checkpoint, after `settle`."""
        return {"skipped": self.skipped, "skipped_in_a_row": self.in_a_row}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        try:
            self.skipped, self.in_a_row = int(state["skipped"]), int(state["skipped_in_a_row"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the checkpoint's count of skipped steps is damaged ({error!r})") from error
