"""Skips training steps whose loss or gradient is not finite or far above its usual value."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import groupby
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.errors import UserError

SETTLED = 100  # steps before spikes are looked for
DECAY = 0.99  # of the running means
NAMES = ("loss", "grad_norm")


class Skipped(NamedTuple):
    """A skipped step: the first part that was not accepted, why, losses and samples' keys of this process's batches."""

    step: int
    part: str
    reason: str
    losses: list[float]
    keys: list[list[str]]
    in_a_row: int


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
        self._checked: list[tuple[int, str, Tensor, list[list[str]]]] = []

    def check(
        self, step: int, part: str, values: Tensor, finite: Tensor, losses: Tensor, keys: list[list[str]] | None = None
    ) -> Tensor:
        """Return whether a part's step is accepted, () bool; then its values enter the running means.

        Args:
            values: (2,) loss and gradient norm, over all processes. finite: () bool, whether both were.
            losses: (n,) of this process's batches. keys: of their samples.
        """
        values, figures = values.double(), self.figures[part]
        mean, deviation, steps = figures
        mean = torch.where(steps > 0, mean, values)
        accepted = finite
        if self.spike is not None:
            accepted = accepted & ~((steps >= SETTLED) & (values > mean + self.spike * deviation)).any()
        row = torch.cat([torch.stack([accepted, finite]).double(), values, mean, deviation, losses.double()])
        self._checked.append((step, part, row, keys or []))
        rate = (1 / (steps + 1)).clamp_min(1 - DECAY)  # a plain mean at first
        new_deviation = deviation + rate * ((values - mean).abs() - deviation)
        updated = torch.stack([mean + rate * (values - mean), new_deviation, steps + 1])
        self.figures[part] = torch.where(accepted, updated, figures)
        return accepted

    def settle(self) -> list[Skipped]:
        """Count and return the steps skipped since the last call. Synchronises with the device."""
        skips, checked, self._checked = [], self._checked, []
        rows = [row for _, _, row, _ in checked]
        rows = torch.cat(rows).cpu().split([len(row) for row in rows]) if rows else ()  # one copy
        for step, parts in groupby(zip(checked, rows), key=lambda entry: entry[0][0]):
            refused = [(part, row.tolist(), keys) for (_, part, _, keys), row in parts if not row[0]]
            self.in_a_row = self.in_a_row + 1 if refused else 0
            if refused:
                part, row, keys = refused[0]
                self.skipped += 1
                skips.append(Skipped(step, part, self._reason(*row[1:8]), row[8:], keys, self.in_a_row))
        return skips

    def _reason(self, finite: float, *figures: float) -> str:
        if not finite:
            return "loss or gradient is not finite"
        values, means, deviations = figures[:2], figures[2:4], figures[4:]
        return " and ".join(
            f"{name} {value:.4g} is far above its running mean {mean:.4g} (usual deviation {deviation:.2g})"
            for name, value, mean, deviation in zip(NAMES, values, means, deviations)
            if value > mean + self.spike * deviation
        )

    def write_down(self, skip: Skipped, batches: list[dict[str, Any]]) -> None:
        """Add a line about a skipped step and all processes' batches. Raises OSError."""
        batches = [b | {"loss": b["loss"] if isfinite(b["loss"]) else str(b["loss"])} for b in batches]
        line = {"step": skip.step, "part": skip.part, "reason": skip.reason, "batches": batches}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, after `settle`. Synchronises with the device."""
        columns = {part: zip(NAMES, figures.T.tolist()) for part, figures in self.figures.items()}
        figures = {f"{part}/{name}": row for part, each in columns.items() for name, row in each if row[2]}
        return {"skipped": self.skipped, "skipped_in_a_row": self.in_a_row, "figures": figures}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        try:
            self.skipped, self.in_a_row = int(state["skipped"]), int(state["skipped_in_a_row"])
            for part, zeros in self.figures.items():
                rows = [[float(x) for x in state["figures"].get(f"{part}/{name}", (0, 0, 0))] for name in NAMES]
                self.figures[part] = zeros.new_tensor(rows).T.contiguous().view_as(zeros)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(f"the checkpoint's count of skipped steps is damaged ({error!r})") from error
