"""Evaluate the outputs of any system: `python scripts/evaluate.py table=NAME outputs=DIR references=DIR output=REPORT`.

`python scripts/evaluate.py MODEL [options]` measures what only the synthetic corpus can show (corpus_figures.py)."""

from __future__ import annotations

if __name__ == "__main__":
    import environment  # noqa: F401 -- before anything that may be missing

import platform
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from benchmarks.record import write_json
from engine.bounds import require_range
from engine.config import load
from engine.device import pick_device
from engine.errors import UserError, printable, run_cli
from engine.evaluation.clips import Clip, read_clips, system_facts
from engine.evaluation.measure import cores, measure
from engine.evaluation.report import write_report
from engine.evaluation.summary import summarise, table_lines
from engine.files import writable
from engine.media.limits import Limits, set_limits
from engine.metrics.registry import metrics_of, protocol_of

HELP = """
Compute a paper's table for the outputs of any system, from two folders or a manifest. Every figure comes with a 95 %
interval, the row of the true speech and the paper's own rows. OUTPUT gets report.html (one file, no network needed),
results.json and a cache: the same command goes on where it stopped. A file that cannot be used, and a figure whose
network was not downloaded, are named and left out.

A manifest has a clip a line, {"id": ..., "text": ..., "speaker": ...}; its files are ID.wav or ID.mp4 in outputs= and
references=, or those that output, reference and video name (paths from the manifest's folder). Several systems side by
side: outputs={one: DIR, other: DIR}. model=NAME generates the outputs first.

What only the synthetic corpus can show: python scripts/evaluate.py MODEL --help

Examples:
python scripts/evaluate.py table=hicodit outputs=spoken references=true manifest=test.jsonl output=report
python scripts/evaluate.py table=hicodit outputs="{ours: a, theirs: b}" references=true output=report
python scripts/evaluate.py table=codec metrics=[pesq_wide,stoi] outputs=decoded references=true output=report
python scripts/evaluate.py model=hicodit references=data/synthetic/seen manifest=data/synthetic/seen.jsonl clips=20 \\
    protocol.wer=grammar grammar=data/synthetic/grammar.jsgf output=report
"""

ENCODERS = {"wavlm": "talker_t2av.speaker.encoder.WavLMEncoder"}  # networks of the models that metrics use, too
MODELS = {
    "hicodit": "hicodit.evaluation",
    "talker_t2av": "talker_t2av.evaluation",
    "rvq_codec": "rvq_codec.evaluation",
    "whisperx_vae": "whisperx_vae.evaluation",
}


def main() -> int:
    if len(sys.argv) > 1 and "=" not in sys.argv[1] and not sys.argv[1].startswith("-"):
        from scripts import corpus_figures

        return corpus_figures.main() or 0
    config = load("evaluate", sys.argv[1:], HELP)
    set_limits(Limits(**config.limits))
    figures = list(OmegaConf.to_container(config)["metrics"] or config.columns)
    protocols = choose_protocols(config, figures)
    for name, value in (("clips", config.clips), ("workers", config.workers), ("resamples", config.resamples)):
        if value is not None:
            require_range(name, value, 1, 10**7)
    device, output = str(pick_device(config.device)), Path(config.output)
    outputs = output_folders(config)
    references = Path(config.references) if config.references else None
    manifest = Path(config.manifest) if config.manifest else None
    clips = read_clips(manifest, references, outputs, config.clips)
    with writable(output):
        if config.model:
            folder = output / "outputs"
            import_module(MODELS[config.model]).write_outputs(clips, folder, device, **config.generate)
            outputs = {**outputs, config.model: folder}
            clips = read_clips(manifest, references, outputs, config.clips)
        if config.video == "output":
            clips = [own_pictures(clip) for clip in clips]
        workers = config.workers or cores()
        cache = Path(config.cache) if config.cache else output / "cache"
        print(f"{len(clips)} clips, {', '.join([*outputs]) or 'true speech alone'}, {workers} processes on {device}")
        results = measure(clips, metrics_of(figures), protocols, Path(config.weights), device, workers, cache)
        summary = summarise(clips, results, figures, protocols, config.resamples)
        summary |= about(config, clips, outputs, device)
        write_json(output / "results.json", summary)
        write_report(output / "report.html", summary, clips, config.media)
    tell(summary, output)
    return 1 if any(row["where"] == "file" for row in summary["left_out"]["files"]) else 0


def tell(summary: Mapping[str, Any], output: Path) -> None:
    """Print the table, and on the error output what was left out."""
    print(*table_lines(summary, summary["paper"]), sep="\n")
    for figure, why in summary["left_out"]["figures"].items():
        print(printable(f"left out: {figure}: {why}"), file=sys.stderr)
    files = summary["left_out"]["files"]
    for row in files[:20]:
        line = f"left out: {row['clip']} ({row['system']}, {row['where']}): {row['why']}"
        print(printable(line), file=sys.stderr)
    if len(files) > 20:
        print(f"left out: {len(files) - 20} more, listed in {output / 'results.json'}", file=sys.stderr)
    print("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in summary["seconds"].items()))
    print(f"written: {output / 'report.html'}, {output / 'results.json'}")


def choose_protocols(config: DictConfig, figures: list[str]) -> dict[str, str]:
    """Protocol by class of metric, with what it needs after a colon.

    Raises:
        UserError: an unknown figure or protocol.
    """
    chosen, given = {}, OmegaConf.to_container(config.protocol)
    arguments = {"grammar": config.grammar or "", **ENCODERS}
    for metric, (figure, *_) in metrics_of(figures).items():
        protocol = protocol_of(metric, given)
        if protocol not in metric.protocols:
            raise UserError(f"protocol.{figure}={protocol} is unknown; choose {', '.join(metric.protocols)}")
        argument = f":{arguments[protocol]}" if protocol in arguments else ""
        chosen[metric.__name__] = protocol + argument
    return chosen


def output_folders(config: DictConfig) -> dict[str, Path]:
    """Folder of each system.

    Raises:
        UserError: `outputs` is neither a folder nor a mapping, or `model` is unknown.
    """
    if config.model and config.model not in MODELS:
        raise UserError(f"model={config.model} is unknown; choose {', '.join(MODELS)}")
    outputs = config.outputs
    if outputs is None:
        return {}
    if isinstance(outputs, str):
        return {Path(outputs).name or "output": Path(outputs)}
    if not isinstance(outputs, DictConfig) or not all(isinstance(value, str) for value in outputs.values()):
        raise UserError("outputs must be a folder, or several as {name: folder, other: folder}")
    return {str(name): Path(folder) for name, folder in outputs.items()}


def own_pictures(clip: Clip) -> Clip:
    """Without the source's pictures where a system has its own: they would be compared with themselves."""
    return replace(clip, takes={name: replace(take, source=None) for name, take in clip.takes.items()})


def about(config: DictConfig, clips: list[Clip], outputs: dict[str, Path], device: str) -> dict[str, Any]:
    """What was evaluated, how, and where."""
    paper = {
        name: dict(zip(config.columns, values))
        for name, values in (config.paper or {}).items()
        if config.true_speech is None or "true speech" not in name or config.true_speech in name
    }
    settings = OmegaConf.to_container(config, resolve=True)
    return {
        "title": config.title or f"Evaluation: {', '.join(outputs) or 'true speech'}",
        "paper": paper,
        "count": len(clips),
        "about_systems": {name: system_facts(folder) for name, folder in outputs.items()},
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "settings": {key: settings[key] for key in ("columns", "protocol", "clips", "resamples", "model", "generate")},
        "hardware": {
            "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine(),
            "cores": cores(),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


if __name__ == "__main__":
    run_cli(main)
