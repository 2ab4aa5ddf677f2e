"""The steps of an evaluation: generate missing outputs, measure, and report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from engine.config import compose, plain
from engine.device import count_devices, pick_device
from engine.errors import UserError, printable
from engine.evaluation.clips import Clip, read_clips, read_corpus, system_facts, with_exchanged
from engine.evaluation.generate import write_on_devices
from engine.evaluation.measure import Results, measure
from engine.evaluation.paper_tables import PaperTable, paper_lines, read_paper_tables
from engine.evaluation.report import write_report
from engine.evaluation.summary import comparison_lines, headline, summarise, table_lines
from engine.evaluation.systems import choose_systems, output_folders
from engine.evaluation.workers import Workers
from engine.files import writable, write_json
from engine.metrics.metric import Metric
from engine.metrics.registry import FIGURES, metrics_of, protocol_of
from engine.processes import usable_cores
from engine.record import origin, portable, write_record
from engine.settings import ClusterConfig, Limits, require_choice, set_limits

ARGUMENTS = {  # argument of metrics by protocol, such as the dotted name of an encoder: `engine` imports no models
    "wavlm": "talker_t2av.speaker.encoder.WavLMEncoder",
    "drawn": "corpora.synthetic.mouth_opening.MouthReader",
    "landmarks": "engine.metrics.lips.LandmarkReader",
}
RECORDED = ("columns", "protocol", "clips", "resamples", "model", "generate")  # settings in results.json


def evaluate(config: DictConfig, split: str | None, output: Path) -> dict[str, Any]:
    """Generate missing outputs, measure, and write report and results of one set of clips to `output`.

    Args:
        config: settings, see `engine.evaluation.settings.EvaluateConfig`.
        split: split of the synthetic corpus. None: clips of a manifest or of a folder of references.
        output: folder of report.html, results.json, the generated outputs and the cache.

    Returns:
        The contents of results.json.

    Raises:
        UserError: If a setting is invalid, files are missing, or no metric can be computed.
    """
    set_limits(Limits(**config.limits))
    device = str(pick_device(config.device))
    metrics = choose_metrics(config, split, device)
    defaults = table_defaults()
    systems = choose_systems(config, defaults["generate"])
    devices = count_devices(config.devices, config.device, config.executor)
    outputs = output_folders(config, systems)
    paper_tables = read_paper_tables(plain(config)["paper_tables"])
    if config.references and not config.manifest and output.resolve().is_relative_to(Path(config.references).resolve()):
        raise UserError(f"output={output} is within references=, where all files are clips: use another folder")
    clips = read_all_clips(config, split, outputs)
    cache = Path(config.cache) if config.cache else output / "cache"
    with writable(output), writable(cache, "cache"):
        if systems:
            outputs |= generate_outputs(config, systems, clips, output, devices)
            clips = read_all_clips(config, split, outputs)
        clips = with_controls(config, clips)
        summary = measure_clips(config, metrics, clips, cache, device)
        summary["notes"] += protocol_notes(summary["figures"], paper_tables, defaults["protocol"])
        summary |= describe(config, split, clips, outputs, summary["figures"])
        summary |= origin(device)
        summary["paper_tables"] = [asdict(table) for table in paper_tables]
        summary["output"] = str(output)
        write_json(output / "results.json", portable(summary))
        write_report(output / "report.html", summary, clips, config.media)
    if config.record:
        record = Path(f"{config.record}-{split}" if split else config.record)
        results = headline(summary)
        write_record(record.parent, record.name, summary["title"], results, device, settings=summary["settings"])
    return summary


def choose_metrics(config: DictConfig, split: str | None, device: str) -> dict[str, Metric]:
    """Return the metric that measures each figure to measure, with the protocol selected in `config`.

    Raises:
        UserError: If a protocol is unknown, or its grammar is missing.
    """
    figures = plain(config)["metrics"] or list(config.columns)
    figures = [figures] if isinstance(figures, str) else [*dict.fromkeys(figures)]
    chosen = {}
    given = plain(config.protocol)
    for figure in given:
        require_choice("protocol", figure, FIGURES)
    grammar = config.grammar or (f"{config.corpus}/grammar.jsgf" if config.corpus else "")
    arguments = {"grammar": grammar, "shards": config.voices.get(split or ""), **ARGUMENTS}
    given |= {"own_voice_first": "shards"} if arguments["shards"] else {}
    for metric, names in metrics_of(figures).items():
        protocol = protocol_of(metric, given)
        if protocol not in metric.protocols:
            choices = f"choose {', '.join(metric.protocols)}" if any(metric.protocols) else "it has only one: omit it"
            raise UserError(f"protocol.{names[0]}={protocol} is unknown; {choices}")
        if protocol == "grammar" and not Path(grammar).is_file():
            why = f"grammar={grammar} is not a file" if grammar else "none is given"
            raise UserError(f"protocol.wer=grammar requires grammar=FILE.jsgf: {why}")
        argument = f":{arguments[protocol]}" if protocol in arguments else ""
        chosen |= dict.fromkeys(names, metric(protocol + argument, Path(config.downloads), device))
    return {figure: chosen[figure] for figure in figures}


def read_all_clips(config: DictConfig, split: str | None, outputs: Mapping[str, Path]) -> list[Clip]:
    """Read the clips of a split of the corpus, or those of the manifest or the reference folder."""
    if config.corpus:
        return read_corpus(Path(config.corpus), split, outputs, config.clips)
    manifest = Path(config.manifest) if config.manifest else None
    references = Path(config.references) if config.references else None
    return read_clips(manifest, references, outputs, config.clips)


def generate_outputs(
    config: DictConfig,
    systems: Mapping[str, Callable[..., None]],
    clips: Sequence[Clip],
    output: Path,
    devices: int,
) -> dict[str, Path]:
    """Generate the missing outputs of each system on `devices` devices. Return the folder of each system.

    Args:
        systems: see `choose_systems`.
        output: folder of the report, in which those of the systems are.
    """
    ray = ClusterConfig(**config.ray) if config.executor == "ray" else None
    folders = {}
    for name, write in systems.items():
        folders[name] = output / "outputs" / (name if config.systems else "")
        write_on_devices(partial(write, clips, folders[name]), config.device, devices, ray)
    return folders


def with_controls(config: DictConfig, clips: list[Clip]) -> list[Clip]:
    """Remove the source videos with `video=output`, and add control systems with `exchanged=true`."""
    if config.video == "output":  # the frames of the source would be compared with themselves
        clips = [
            replace(clip, takes={name: replace(take, source=None) for name, take in clip.takes.items()})
            for clip in clips
        ]
    return with_exchanged(clips) if config.exchanged else clips


def measure_clips(
    config: DictConfig, metrics: Mapping[str, Metric], clips: Sequence[Clip], cache: Path, device: str
) -> dict[str, Any]:
    """Measure the clips and return the figures of each system, see `summarise`.

    Args:
        metrics: metric of each figure.
        cache: folder of the cached measurements.
        device: name of the device, which is printed.

    Raises:
        UserError: If no metric can be computed.
    """
    workers = config.workers or usable_cores()
    names = ", ".join(clips[0].takes) or "ground-truth speech alone"
    print(f"{len(clips)} clips, {names}, {workers} {'process' if workers == 1 else 'processes'} on {device}")
    with Workers(min(workers, len(clips))) as processes:
        results = measure(clips, dict.fromkeys(metrics.values()), cache, map_function=processes.map)
    summary = summarise(clips, results, with_free_words(metrics, results), config.resamples, config.compare)
    if not summary["figures"]:
        print_left_out(summary)
        raise UserError("no metric of the table could be computed: each line `left out` states why")
    return summary


def with_free_words(metrics: Mapping[str, Metric], results: Results) -> dict[str, Metric]:
    """Add the WER of sentences outside of the grammar, next to that of sentences within it."""
    rows = [row for by_clip in results.rows.get("WordErrors", {}).values() for row in by_clip.values()]
    if "wer" not in metrics or "wer_free" in metrics or not any("wer_free" in row for row in rows):
        return dict(metrics)
    figures = [name for figure in metrics for name in ((figure, "wer_free") if figure == "wer" else (figure,))]
    return {figure: metrics.get(figure, metrics["wer"]) for figure in figures}


def table_defaults() -> dict[str, Any]:
    """Return the settings of the chosen table, without the rest of the command line."""
    table = [f"table={HydraConfig.get().runtime.choices.table}"] if HydraConfig.initialized() else []
    return plain(compose("evaluate", table))


def protocol_notes(
    figures: Mapping[str, Mapping[str, Any]], tables: Sequence[PaperTable], defaults: Mapping[str, str]
) -> list[str]:
    """Return which of the measured figures the paper computed with another protocol.

    Args:
        figures: the measured figures.
        tables: the paper's tables.
        defaults: protocols of the chosen table.
    """
    stated = set().union(*(table.stated for table in tables))
    if not stated:
        return []
    notes = []
    for metric, names in metrics_of([*figures]).items():
        own = protocol_of(metric, defaults)
        here = figures[names[0]]["protocol"]
        titles = ", ".join(metric.figures[f].title for f in names if f in stated)
        if own != here and titles:
            notes.append(f"the paper's {titles} by {own}, those above by {here}: not comparable")
    return notes


def describe(
    config: DictConfig,
    split: str | None,
    clips: Sequence[Clip],
    outputs: Mapping[str, Path],
    figures: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Return what results.json states about an evaluation besides the figures: clips, systems, targets, settings.

    Args:
        outputs: folder of the outputs of each system.
        figures: the measured figures.
    """
    settings = plain(config)
    aim = config.aim.get(split or "") or {}
    return {
        "title": config.title or f"Evaluation: {', '.join(clips[0].takes) or 'true speech'}",
        "aim": {name: value for name, value in aim.items() if value is not None and name in figures},
        "count": len(clips),
        "speakers": {clip.id: clip.speaker for clip in clips},
        "about_systems": {name: system_facts(folder) for name, folder in outputs.items()},
        "settings": {key: settings[key] for key in RECORDED},
    }


def print_summary(summary: Mapping[str, Any]) -> None:
    """Print the table and the comparison of systems, and the skipped items on standard error."""
    papers = [PaperTable(**table) for table in summary["paper_tables"]]
    print(*table_lines(summary), *paper_lines(papers, summary["figures"]), *comparison_lines(summary), sep="\n")
    for note in summary["notes"]:
        print(printable(f"note: {note}"))
    print_left_out(summary)
    print("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in summary["seconds"].items()))
    print("written: " + ", ".join(str(Path(summary["output"]) / name) for name in ("report.html", "results.json")))


def print_left_out(summary: Mapping[str, Any]) -> None:
    """Print the omitted figures and the first twenty skipped files or measurements, with the reasons."""
    for figure, why in summary["left_out"]["figures"].items():
        print(printable(f"left out: {figure}: {why}"), file=sys.stderr)
    files = summary["left_out"]["files"]
    for row in files[:20]:
        line = f"left out: {row['clip']} ({row['system']}, {row['where']}): {row['why']}"
        print(printable(line), file=sys.stderr)
    if len(files) > 20:
        print(f"left out: {len(files) - 20} more, listed in results.json", file=sys.stderr)
