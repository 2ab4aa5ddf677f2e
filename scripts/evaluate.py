"""Evaluate the outputs of any system: `python scripts/evaluate.py table=NAME outputs=DIR references=DIR output=REPORT`.

`python scripts/evaluate.py MODEL [options]` measures what only the synthetic corpus can show (corpus_figures.py)."""

from __future__ import annotations

if __name__ == "__main__":
    import environment  # noqa: F401 -- before anything that may be missing

import platform
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from engine.config import load
from engine.device import pick_device
from engine.errors import UserError, printable, run_cli
from engine.evaluation.clips import Clip, read_clips, system_facts
from engine.evaluation.measure import Results, cores, measure
from engine.evaluation.report import write_report
from engine.evaluation.summary import comparison_lines, summarise, table_lines
from engine.files import writable
from engine.media.limits import Limits, set_limits
from engine.metrics.registry import metrics_of, protocol_of
from engine.record import write_json
from engine.settings import require_range

HELP = """
Compute a paper's table for the outputs of any system, from two folders or a manifest. Every figure comes with a 95 %
interval, the row of the true speech and the paper's own rows. OUTPUT gets report.html (one file, no network needed),
results.json and a cache: the same command goes on where it stopped. A file that cannot be used, and a figure whose
network was not downloaded, are named and left out; the exit code is 1 if a file was, 2 if there is nothing to show.

A manifest has a clip a line, {"id": ..., "text": ..., "speaker": ...}; its files are ID.wav or ID.mp4 in outputs= and
references=, or those that output, reference and video name (paths from the manifest's folder). Several systems side by
side, with tests that say which figures show one to be better: outputs={one: DIR, other: DIR}. model=NAME generates the
outputs first.

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
    figures = OmegaConf.to_container(config)["metrics"] or list(config.columns)
    figures = [figures] if isinstance(figures, str) else [*dict.fromkeys(figures)]
    protocols = choose_protocols(config, figures)
    for name, value in (("clips", config.clips), ("workers", config.workers), ("resamples", config.resamples)):
        if value is not None:
            require_range(name, value, 1, 10**7)
    device, output = str(pick_device(config.device)), Path(config.output)
    outputs = output_folders(config)
    references = Path(config.references) if config.references else None
    manifest = Path(config.manifest) if config.manifest else None
    paper = paper_rows(config)
    if references and not manifest and output.resolve().is_relative_to(references.resolve()):
        raise UserError(f"output={output} lies in references=, where all files are clips: name another folder")
    clips = read_clips(manifest, references, outputs, config.clips)
    cache = Path(config.cache) if config.cache else output / "cache"
    with writable(output), writable(cache, "cache"):
        if config.model:
            folder = output / "outputs"
            import_module(MODELS[config.model]).write_outputs(clips, folder, device, **config.generate)
            outputs = {**outputs, config.model: folder}
            clips = read_clips(manifest, references, outputs, config.clips)
        if config.video == "output":
            clips = [own_pictures(clip) for clip in clips]
        workers = config.workers or cores()
        names = ", ".join(clips[0].takes) or "true speech alone"
        print(f"{len(clips)} clips, {names}, {workers} {'process' if workers == 1 else 'processes'} on {device}")
        results = measure(clips, metrics_of(figures), protocols, Path(config.weights), device, workers, cache)
        summary = summarise(clips, results, with_free_words(figures, results), protocols, config.resamples)
        if not summary["figures"]:
            tell_left_out(summary, output)
            raise UserError("no figure of the table could be computed, for the reasons above")
        summary["notes"] += protocol_notes(config, protocols, summary["figures"], paper)
        summary |= about(config, clips, summary["figures"], paper, outputs, device)
        write_json(output / "results.json", summary)
        write_report(output / "report.html", summary, clips, config.media)
    tell(summary, output)
    return 1 if any(row["where"] == "file" for row in summary["left_out"]["files"]) else 0


def tell(summary: Mapping[str, Any], output: Path) -> None:
    """Print the table and the comparison of its systems, and on the error output what was left out."""
    print(*table_lines(summary, summary["paper"]), *comparison_lines(summary), sep="\n")
    for note in summary["notes"]:
        print(printable(f"note: {note}"))
    tell_left_out(summary, output)
    print("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in summary["seconds"].items()))
    print(f"written: {output / 'report.html'}, {output / 'results.json'}")


def tell_left_out(summary: Mapping[str, Any], output: Path) -> None:
    """Print figures, and the first twenty files or measurements, that are not in the table, with the reason."""
    for figure, why in summary["left_out"]["figures"].items():
        print(printable(f"left out: {figure}: {why}"), file=sys.stderr)
    files = summary["left_out"]["files"]
    for row in files[:20]:
        line = f"left out: {row['clip']} ({row['system']}, {row['where']}): {row['why']}"
        print(printable(line), file=sys.stderr)
    if len(files) > 20:
        print(f"left out: {len(files) - 20} more, listed in {output / 'results.json'}", file=sys.stderr)


def with_free_words(figures: list[str], results: Results) -> list[str]:
    """Word errors of sentences outside the grammar stand beside those of the others, which do not count them."""
    rows = [row for by_clip in results.rows.get("WordErrors", {}).values() for row in by_clip.values()]
    if "wer" not in figures or "wer_free" in figures or not any("wer_free" in row for row in rows):
        return figures
    at = figures.index("wer") + 1
    return [*figures[:at], "wer_free", *figures[at:]]


def paper_rows(config: DictConfig) -> dict[str, dict[str, float | None]]:
    """The paper's rows by name, values by figure; of its true-speech rows those that `true_speech` names.

    Raises:
        UserError: `true_speech` names none.
    """
    rows = {name: dict(zip(config.columns, values)) for name, values in (config.paper or {}).items()}
    true = [name for name in rows if "true speech" in name]
    if config.true_speech is None:
        return rows
    chosen = [name for name in true if config.true_speech in name]
    if not chosen:
        known = ", ".join(name.removesuffix(" true speech") for name in true) or "none"
        raise UserError(f"true_speech={config.true_speech} is none of the table's true-speech rows: {known}")
    return {name: row for name, row in rows.items() if name not in true or name in chosen}


def protocol_notes(
    config: DictConfig, protocols: Mapping[str, str], figures: Iterable[str], paper: Mapping[str, Any]
) -> list[str]:
    """Which of the paper's figures were computed in another way than those of this evaluation."""
    words = [word for word in sys.argv[1:] if word.startswith("table=")]
    defaults = load("evaluate", [*words, "output=-"], HELP).protocol
    notes = []
    for metric, names in metrics_of([*figures]).items():
        own, here = protocol_of(metric, defaults), protocols[metric.__name__].partition(":")[0]
        titles = [metric.figures[f].title for f in names if any(row.get(f) is not None for row in paper.values())]
        if own != here and titles:
            which = f"the paper's {', '.join(titles)} by {own}, those above by {here}"
            notes.append(f"{which}: the two cannot be compared")
    return notes


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
        if protocol == "grammar" and not Path(config.grammar or "").is_file():
            why = f"grammar={config.grammar} is no file" if config.grammar else "none is given"
            raise UserError(f"protocol.wer=grammar needs grammar=FILE.jsgf: {why}")
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
    if isinstance(outputs, str) and outputs.startswith("{"):
        raise UserError(f"outputs={outputs} cannot be read: quote names and folders with special characters")
    if isinstance(outputs, str):
        return {Path(outputs).name or "output": Path(outputs)}
    if not isinstance(outputs, DictConfig) or not all(isinstance(value, str) for value in outputs.values()):
        raise UserError("outputs must be a folder, or several as {name: folder, other: folder}")
    if config.model in outputs:
        raise UserError(f"outputs: {config.model} is the name of model=; give the folder another one")
    return {str(name): Path(folder) for name, folder in outputs.items()}


def own_pictures(clip: Clip) -> Clip:
    """Without the source's pictures where a system has its own: they would be compared with themselves."""
    return replace(clip, takes={name: replace(take, source=None) for name, take in clip.takes.items()})


def about(
    config: DictConfig,
    clips: list[Clip],
    figures: Iterable[str],
    paper: Mapping[str, Mapping[str, Any]],
    outputs: Mapping[str, Path],
    device: str,
) -> dict[str, Any]:
    """What was evaluated, how, and where."""
    settings = OmegaConf.to_container(config, resolve=True)
    return {
        "title": config.title or f"Evaluation: {', '.join(clips[0].takes) or 'true speech'}",
        "paper": {name: row for name, row in paper.items() if any(row.get(f) is not None for f in figures)},
        "count": len(clips),
        "about_systems": {name: system_facts(folder) for name, folder in outputs.items()},
        "date": date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "settings": {key: settings[key] for key in ("columns", "protocol", "clips", "resamples", "model", "generate")},
        "hardware": {
            "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine(),
            "cores": cores(),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


if __name__ == "__main__":
    run_cli(main)
