"""Words, own voice and prosody against network evaluations, for the samplers of HiCoDiT, with 95 % intervals.

Clips of a synthetic corpus are spoken with each of `--methods` in each of `--steps`, all with the guidance of
`sampler=fast` (one scale for all conditions: two branches, so twice as many evaluations as steps), and with each of
`--points`: files of configs/sampler with changes, as in `fast,sampler.steps=12,guidance.all=2`. The first row is the
true speech, the second what the tokenizer makes of it. Choose settings on a split that is not reported (`dev`).

Evaluations are counted: rows that the network was given, a guidance branch counting as one, divided by the windows of
all clips. Own voice: the clip's GE2E vector is nearest to the mean of its own voice (without the clip itself) among the
voices with several clips in the split; other clips do not count. Prosody: correlation of pitch range and energy with
the true clips, and how often they move the right way where the expression changes. Intervals of correlations are
Fisher's, all others a bootstrap over clips.

Axes: N samples, C clips, V voices, F pitch frames.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from benchmarks.levels import correlation
from engine.bounds import PRECISIONS
from engine.config import CONFIGS, override
from engine.errors import UserError
from engine.evaluation.statistics import bootstrap_interval
from engine.files import atomic_output
from engine.media.audio import read_audio
from engine.media.corpus import pick_rows
from engine.metrics.recogniser import CorpusRecogniser
from engine.metrics.speaker import GE2EEncoder
from engine.metrics.speech import PITCH_HOP, energy, pitch, pitch_range
from engine.metrics.words import count_errors
from hicodit.evaluation import expected_moves, synthesise
from hicodit.generation import windows
from hicodit.pipeline import BUNDLED, HiCoDiTPipeline
from hicodit.settings import METHODS, GuidanceScales, SamplerConfig
from hicodit.system import CODECS  # noqa: F401 -- registers the tokenizers

LEAST: dict[str, float] = {"clips": 4, "steps": 1}
GREEDY = {"temperature": 0.0, "choice_noise": 1.0}
DRAWN = {"temperature": 0.7}
OWN: dict[str, dict[str, Any]] = {"ordered": GREEDY, "entropy": GREEDY}  # as docs/LOG.md found; the others: DRAWN
Point = tuple[str, SamplerConfig, GuidanceScales]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", type=Path, default=BUNDLED, help="release folder")
    parser.add_argument("--corpus", type=Path, default=Path("data/synthetic_2"), help="folder of the corpus")
    parser.add_argument("--split", default="dev", help="split of the corpus")
    parser.add_argument("--clips", type=int, default=60, help="number of clips")
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS, help="sampling methods")
    parser.add_argument("--steps", nargs="+", type=int, default=[4, 8, 16, 32, 64], help="numbers of steps")
    parser.add_argument("--points", nargs="*", default=["fast", "paper"], help="files of configs/sampler, with changes")
    parser.add_argument("--precision", default="auto", choices=PRECISIONS, help="of the model")
    parser.add_argument("--batch", type=int, default=16, help="batch size")


def run(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    pipeline = HiCoDiTPipeline.from_pretrained(args.weights, args.device, precision=args.precision)
    points = [read_point(pipeline, text) for text in args.points]
    for steps in args.steps:
        for method in args.methods:
            changes = {"method": method, "steps": steps, **OWN.get(method, DRAWN)}
            _, sampler, guidance = read_point(pipeline, "fast")
            points.append((method, override(sampler, changes), guidance))
    clips, rows = HeldOut(pipeline, args), []

    def result(name: str, waves: list[np.ndarray], **about: Any) -> tuple[dict[str, Any], str]:
        row = {"name": name, **about, **clips.figures(waves)}
        rows.append(row)
        return row, ", ".join(f"{key} {value}" for key, value in row.items())

    yield result("true speech", clips.true)
    yield result("tokenizer alone", clips.resynthesis())
    for name, sampler, guidance in points:
        pipeline.sampler, pipeline.guidance = sampler, guidance
        start = time.process_time()
        with Evaluations(pipeline) as count:
            waves = [speech.wave for speech in synthesise(pipeline, clips.crops, 0, args.batch)]
        evaluations = round(count.rows / sum(len(windows(len(c), sampler)) for c in clips.crops), 2)
        seconds = round((time.process_time() - start) / clips.seconds, 3)
        yield result(name, waves, steps=sampler.steps, evaluations=evaluations, processor_seconds_a_second=seconds)
    path = args.out / f"{time.strftime('%Y-%m-%d')}-samplers-{args.device.type}.png"
    chart(rows, path)
    yield {"chart": path.name}, str(path)


def read_point(pipeline: HiCoDiTPipeline, text: str) -> Point:
    """`FILE,sampler.steps=12,...` -> its name and settings, over those of the release.

    Raises:
        UserError: there is no such file in configs/sampler, or a setting is unknown or out of range.
    """
    preset, *changes = text.split(",")
    path = CONFIGS / "sampler" / f"{preset}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise UserError(f"--points {preset} is no file of configs/sampler: choose {names}")
    sampler, guidance = pipeline.sampler, pipeline.guidance
    for config in (OmegaConf.load(path), OmegaConf.from_dotlist(changes)):
        given = OmegaConf.to_container(config) or {}
        unknown = set(given) - {"sampler", "guidance"}
        if unknown:
            raise UserError(f"--points {text}: {min(unknown)} is neither sampler.FIELD=VALUE nor guidance.FIELD=VALUE")
        sampler = override(sampler, given.get("sampler", {}))
        guidance = override(guidance, given.get("guidance", {}))
    return text, sampler, guidance


class Evaluations:
    """Counts the rows that a pipeline's network is given: clips times guidance branches."""

    def __init__(self, pipeline: HiCoDiTPipeline) -> None:
        self.model, self.rows = pipeline.system.model, 0

    def __enter__(self) -> Evaluations:
        self.hook = self.model.register_forward_hook(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()

    def _count(self, module: torch.nn.Module, given: tuple, log_p: torch.Tensor) -> None:
        self.rows += log_p.shape[0] * log_p.shape[1]  # (branches, clips, ...)


class HeldOut:
    """Clips of a split, and the figures of what was made of them.

    Attributes:
        rows: (C) of the manifest. crops: (C). true: (C) waves (N,) at the tokenizer's rate. seconds: of all.
    """

    def __init__(self, pipeline: HiCoDiTPipeline, args: argparse.Namespace) -> None:
        self.folder, self.split, self.pipeline = args.corpus, args.split, pipeline
        self.rows = pick_rows(args.corpus, args.split, args.clips)
        self.rate = pipeline.codec.sample_rate
        self.texts = [row["text"] for row in self.rows]
        self.crops = [pipeline.crops(self.path(row, "mp4")) for row in self.rows]
        self.true = [read_audio(self.path(row, "wav"), self.rate) for row in self.rows]
        self.seconds = sum(map(len, self.true)) / self.rate
        self.recogniser, self.encoder = CorpusRecogniser(args.corpus / "grammar.jsgf"), GE2EEncoder()

    def path(self, row: Mapping[str, Any], suffix: str) -> Path:
        return self.folder / self.split / f"{row['id']}.{suffix}"

    @torch.inference_mode()
    def resynthesis(self) -> list[np.ndarray]:
        """What the tokenizer makes of the true waves."""
        codec, device = self.pipeline.codec, self.pipeline.device
        made = (codec.decode(codec.encode(torch.from_numpy(wave)[None, None].to(device))) for wave in self.true)
        return [wave[0, 0].cpu().numpy() for wave in made]

    def figures(self, waves: Sequence[np.ndarray]) -> dict[str, Any]:
        """Figures of waves (C), each with its interval."""
        return self.words(waves) | self.voices(waves) | self.prosody(waves)

    def words(self, waves: Sequence[np.ndarray]) -> dict[str, Any]:
        heard = self.recogniser.transcribe_all(self.texts, waves, self.rate)
        free = np.array([self.recogniser.is_free(text) for text in self.texts])
        counts = np.array([count_errors(text, said)["wer"] for text, said in zip(self.texts, heard)], float)
        kinds = {"wer": ~free, "wer_free": free}
        return {
            key: value
            for name, kind in kinds.items()
            if kind.any()
            for key, value in share(name, counts[kind, 0], counts[kind, 1]).items()
        }

    @cached_property
    def known(self) -> tuple[list[str], dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Voices with several clips in the split (V), vectors by clip, and the sum of each voice's vectors."""
        vectors, sums = {}, {}
        rows = pick_rows(self.folder, self.split, 10**9)
        count = Counter(str(row["voice"]) for row in rows)
        for row in rows:
            voice = str(row["voice"])
            if count[voice] > 1:
                vectors[row["id"]] = self.encoder.embed(read_audio(self.path(row, "wav"), 16_000), 16_000)
                sums[voice] = sums.get(voice, 0) + vectors[row["id"]]
        return sorted(sums), vectors, sums

    def voices(self, waves: Sequence[np.ndarray]) -> dict[str, Any]:
        names, vectors, sums = self.known
        first, own = [], []
        for row, wave in zip(self.rows, waves):
            voice = str(row["voice"])
            if voice not in names:
                continue
            means = np.stack([sums[name] - vectors[row["id"]] * (name == voice) for name in names])
            cosines = means @ self.encoder.embed(wave, self.rate) / (np.linalg.norm(means, axis=1) + 1e-9)
            first.append(names[cosines.argmax()] == voice)
            own.append(cosines[names.index(voice)])
        if not first:
            return {}
        figures = share("own_voice_first", np.array(first, float), np.ones(len(first)))
        return figures | {"voices": len(names), "voice_similarity": round(float(np.mean(own)), 4)}

    @cached_property
    def true_prosody(self) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        return self.measure(self.true)

    def prosody(self, waves: Sequence[np.ndarray]) -> dict[str, Any]:
        (true, true_parts), (made, parts) = self.true_prosody, self.measure(waves)
        figures: dict[str, Any] = {}
        for column, name in enumerate(("pitch_range", "energy")):
            figures |= correlated(f"{name}_correlation", true[:, column], made[:, column])
        if parts:
            rows = [self.rows[i] for i in parts]
            expected = expected_moves(rows, np.array(list(true_parts.values())))
            right = np.sign(np.diff(np.array(list(parts.values())), axis=1)[:, 0]) == np.sign(expected)
            for column, name in enumerate(("pitch_range", "energy")):
                figures |= share(f"{name}_moves_rightly", right[:, column].astype(float), np.ones(len(right)))
        return figures

    def measure(self, waves: Sequence[np.ndarray]) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Pitch range and energy (C, 2) of clips, and (2 parts, 2) of those within which the expression changes."""
        whole, parts = [], {}
        for i, (row, wave) in enumerate(zip(self.rows, waves)):
            f0 = pitch(wave, self.rate)
            whole.append((pitch_range(f0), energy(wave)))
            if row.get("change") is not None:
                times = [np.array(span) for _, *span in row["phonemes"]]
                sides = [[t for t in times if (t[0] >= row["change"] - 1e-6) == after] for after in (False, True)]
                spans = [(side[0][0], side[-1][1]) for side in sides]
                cuts = [
                    [values[int(a * rate) : int(b * rate)] for values, rate in ((f0, 1 / PITCH_HOP), (wave, self.rate))]
                    for a, b in spans
                ]
                parts[i] = np.array([(pitch_range(f0_cut), energy(cut)) for f0_cut, cut in cuts])
        return np.array(whole), parts


def share(name: str, part: np.ndarray, whole: np.ndarray) -> dict[str, Any]:
    """{NAME: sum(part) / sum(whole), NAME_95: its interval} of clips (C,)."""
    interval = bootstrap_interval(part, whole)
    return {name: round(float(part.sum() / whole.sum()), 4), f"{name}_95": interval and _rounded(interval)}


def correlated(name: str, a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """{NAME: Pearson's r of (C,), NAME_95: Fisher's interval}."""
    r = correlation(a, b)
    z, half = np.arctanh(np.clip(r, -0.9999, 0.9999)), 1.96 / np.sqrt(max(len(a) - 3, 1))
    return {name: round(r, 4), f"{name}_95": _rounded((np.tanh(z - half), np.tanh(z + half)))}


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(float(value), 4) for value in values]


def chart(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Each figure against network evaluations, a line for each method; single points for whole settings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels: dict[str, Callable[[float], float] | str] = {
        "wer": "word errors, closed sentences",
        "wer_free": "word errors, free sentences",
        "own_voice_first": "own voice is the nearest",
        "voice_similarity": "cosine with the own voice",
        "pitch_range_correlation": "pitch range: correlation",
        "energy_correlation": "energy: correlation",
    }
    panels = {name: title for name, title in panels.items() if any(name in row for row in rows)}
    figure, axes = plt.subplots(-(-len(panels) // 2), 2, figsize=(10, 3.2 * -(-len(panels) // 2)), layout="constrained")
    spoken = [row for row in rows if "evaluations" in row]
    for panel, (name, title) in zip(axes.flat, panels.items()):
        for method in dict.fromkeys(row["name"] for row in spoken):
            own = [row for row in spoken if row["name"] == method and name in row]
            own.sort(key=lambda row: row["evaluations"])
            if own:
                x, y = ([row[key] for row in own] for key in ("evaluations", name))
                ends = [row.get(f"{name}_95") or (row[name], row[name]) for row in own]
                bars = [[max(sign * (v - end[i]), 0) for v, end in zip(y, ends)] for i, sign in enumerate((1, -1))]
                style = "o-" if method in METHODS else "*"
                panel.errorbar(x, y, bars, fmt=style, label=method, capsize=2, elinewidth=0.6, markersize=5)
        for row, style in zip(rows[:2], (":", "--")):
            if name in row:
                panel.axhline(row[name], linestyle=style, color="k", linewidth=0.8, label=row["name"])
        panel.set(title=title, xscale="log", xlabel="network evaluations a window")
        panel.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_output(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
    plt.close(figure)
