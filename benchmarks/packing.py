"""The cost of padding in training: padded batches in random order, padded batches by length, and packed batches.

Random clips of the given lengths form batches with about equal numbers of real tokens. A token is a HiCoDiT token at
one level of the codec, or a patch of Talker-T2AV. The forward and backward pass of a training step is timed: CPU time
on one thread, which other programs disturb little, or wall-clock time on CUDA. The share of padding is that of a whole
epoch.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import compute_time
from benchmarks.training import build_task
from engine.config import CONFIGS
from engine.seeding import generator_for
from engine.training.batches import MicroBatches
from engine.training.task import Task
from hicodit.conditions.types import windows_of
from hicodit.data import HiCoDiTDataset
from hicodit.model import TOKENS_PER_FRAME
from talker_t2av.data import SequenceFormat, collate

FPS = 25
SPREADS = {"0.5-6 s": (2.2, 0.6, 0.5, 6.2), "2-20 s": (6.0, 0.5, 2.0, 20.0)}  # log-normal: median, sigma, ends
WAYS = ("padded", "by length", "packed")
LEAST = {"tokens": 1, "batches": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(threads=1)
    names = [path.stem for path in sorted((CONFIGS / "model").glob("*.yaml"))]
    parser.add_argument(
        "--models",
        nargs="+",
        choices=names,
        default=["hicodit_tiny", "talker_t2av_tiny"],
        help="names in configs/model",
    )
    parser.add_argument(
        "--lengths", nargs="+", choices=SPREADS, default=list(SPREADS), help="distributions of clip lengths"
    )
    parser.add_argument(
        "--tokens", type=int, help="real tokens of a batch (None: 2400 for HiCoDiT, 600 for Talker-T2AV)"
    )
    parser.add_argument("--batches", type=int, default=4, help="timed batches of each kind")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="precision of the networks")


def run(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    for name in args.models:
        for spread in args.lengths:
            tokens = args.tokens or (600 if name.startswith("talker") else 2400)
            result = measure(name, spread, tokens, args.batches, args.device, args.precision)
            ways = result["ways"].items()
            line = ", ".join(f"{w} {r['tokens_per_s']:.0f} tokens/s ({r['ratio']:.2f}x)" for w, r in ways)
            yield result, f"{name}, clips of {spread}: {line}"


class Clips:
    """Clips of random content: items of HiCoDiT, or pairs of Talker-T2AV, the second of which is speech only."""

    def __init__(self, model: str, spread: str, packed: bool, count: int = 2000) -> None:
        median, sigma, low, high = SPREADS[spread]
        draw = torch.randn(count, generator=generator_for("lengths", spread))
        self.frames = (FPS * (median * (sigma * draw).exp()).clamp(low, high)).round().long()
        self.talker, self.packed = model.startswith("talker"), packed
        self.format = SequenceFormat(speech_id=256, tail=[257])

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def lengths(self) -> Tensor:
        if not self.talker:
            return self.frames * TOKENS_PER_FRAME
        patches = -(-self.frames // 4)
        both = torch.stack([patches, patches.roll(-(len(self) // 2))])
        return both.sum(0) if self.packed else 2 * both.amax(0)

    def real(self, index: int) -> int:
        """Tokens of an item without padding."""
        if not self.talker:
            return int(self.frames[index]) * TOKENS_PER_FRAME
        return sum(-(-int(self.frames[i]) // 4) for i in (index, (index + len(self) // 2) % len(self)))

    def __getitem__(self, index: int, generator: torch.Generator) -> dict | list[dict]:
        n = int(self.frames[index])
        if not self.talker:
            return {
                "mouth": torch.rand(n, 48, 48, generator=generator),
                "face": torch.rand(3, 64, 64, generator=generator),
                "tokens": torch.randint(256, (TOKENS_PER_FRAME * n, 12), generator=generator),
                "ge2e": torch.rand(256, generator=generator) / 16,
                "expression": torch.zeros(windows_of(n), dtype=torch.long),
                "face_expression": torch.tensor(0),
                "phoneme": torch.zeros(n, dtype=torch.long),
            }
        other = int(self.frames[(index + len(self) // 2) % len(self)])
        return [self._example(n, n, generator), self._example(other, 0, generator)]

    def _example(self, speech: int, motion: int, generator: torch.Generator) -> dict[str, Tensor]:
        prompt = torch.randint(250, (2 + 2 * speech // FPS,), generator=generator).tolist()  # two words a second
        streams = (torch.randn(n, width, generator=generator) for n, width in ((speech, 32), (motion, 40)))
        latents, codes = streams
        return self.format.example(prompt, latents, speech, codes, torch.randn(256, generator=generator))

    def collate(self, items: list) -> dict[str, Tensor]:
        if not self.talker:
            return HiCoDiTDataset.collate(items)
        return collate([pair[side] for side in (0, 1) for pair in items], 0, 4)


def seconds(task: Task, batch: dict[str, Tensor], precision: str) -> float:
    """Seconds of one forward and backward pass."""
    device = next(task.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items()}
    torch.manual_seed(0)
    start = compute_time(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        loss = task(batch, "model")["loss"]
    loss.backward()
    elapsed = compute_time(device) - start
    task.zero_grad(set_to_none=True)
    return elapsed


def measure(name: str, spread: str, tokens: int, batches: int, device: torch.device, precision: str) -> dict:
    """All kinds of batches for one model and one spread of lengths, in turns, so that load affects all alike."""
    changes = {} if name.startswith("talker") else {"codes": 256, "dropout": 0.0}
    plans, tasks = {}, {packed: build_task(name, packed=packed, **changes).to(device) for packed in (False, True)}
    for way in WAYS:
        packed = way == "packed"
        clips = Clips(name, spread, packed)
        budget = None if way == "padded" else tokens
        size = max(1, round(tokens / (sum(map(clips.real, range(200))) / 200)))
        plans[way] = MicroBatches(clips, size, 0, budget), tasks[packed]
    spent, done = dict.fromkeys(WAYS, 0.0), dict.fromkeys(WAYS, 0)
    for number in range(-1, batches):
        for way, (plan, task) in plans.items():
            at = max(number, 0)
            took = seconds(task, plan[at], precision)
            if number >= 0:  # the first one warms up
                spent[way] += took
                done[way] += sum(plan.dataset.real(index) for _, index in plan.samples(at))
    result = {"model": name, "lengths": spread, "tokens": tokens, "batches": batches, "ways": {}}
    for way, (plan, _) in plans.items():
        result["ways"][way] = {
            "tokens_per_s": done[way] / spent[way],
            "ratio": done[way] / spent[way] / (done["padded"] / spent["padded"]),
            "padding": 0.0 if way == "packed" else padding(plan),
            "clips_in_a_batch": plan.mean_size(),
        }
    return result


def padding(plan: MicroBatches, batches: int = 50) -> float:
    """Share of padding in the positions of `batches` batches."""
    real = padded = 0
    for number in range(batches):
        chosen = [index for _, index in plan.samples(number)]
        per_item = plan.dataset.lengths[chosen]
        real, padded = real + sum(map(plan.dataset.real, chosen)), padded + len(chosen) * int(per_item.max())
    return 1 - real / padded
