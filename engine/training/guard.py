"""Skips training steps whose loss or gradient is not finite or far above its usual value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.errors import UserError

SETTLED = 100  # steps before spikes are looked for
DECAY = 0.99  # of the running means


class StepGuard:
    """Decides which steps are skipped, counts those skipped in a row, and records their batches.

    All processes must give it the same figures, so that they decide alike. Its state goes into checkpoints.

    Args:
        run: folder of the run; `bad_batches.jsonl` in it gets a line for each skipped step.
        spike: a loss or gradient norm above its running mean by more than `spike` running mean absolute deviations
            is a spike. None: finite values are never spikes.
    """

    def __init__(self, run: Path, spike: float | None):
        self.path, self.spike = run / "bad_batches.jsonl", spike
        self.skipped = self.in_a_row = 0
        self.figures: dict[str, list[float]] = {}  # name -> [mean, mean absolute deviation, steps]

    def reason_to_skip(self, part: str, figures: dict[str, float], finite: bool) -> str | None:
        """Why the step of `part` is skipped; None: it is not, and its `figures` (loss, grad_norm) enter the means."""
        if not finite:
            return "loss or gradient is not finite"
        for name, value in figures.items():
            mean, spread, steps = self.figures.get(f"{part}/{name}", (value, 0.0, 0))
            if self.spike is not None and steps >= SETTLED and value > mean + self.spike * spread:
                return f"{name} {value:.4g} is far above its running mean {mean:.4g} (usual deviation {spread:.2g})"
        for name, value in figures.items():
            mean, spread, steps = self.figures.get(f"{part}/{name}", (value, 0.0, 0))
            rate = max(1 - DECAY, 1 / (steps + 1))  # a plain mean at first
            spread += rate * (abs(value - mean) - spread)
            self.figures[f"{part}/{name}"] = [mean + rate * (value - mean), spread, steps + 1]
        return None

    def passed(self) -> None:
        """Record that the step was not skipped."""
        self.in_a_row = 0

    def skip(self) -> None:
        """Record that the step was skipped."""
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1

    def write_down(self, record: dict[str, Any]) -> None:
        """Add a line about a skipped step. Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def state(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "skipped_in_a_row": self.in_a_row, "figures": self.figures}

    def load_state(self, state: dict[str, Any]) -> None:
        """
        Raises:
            UserError: `state` is not what `state()` gave.
        """
        try:
            self.skipped, self.in_a_row = int(state["skipped"]), int(state["skipped_in_a_row"])
            figures = state["figures"].items()
            self.figures = {name: [float(mean), float(spread), int(n)] for name, (mean, spread, n) in figures}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"the checkpoint's count of skipped steps is damaged ({error!r})") from error
