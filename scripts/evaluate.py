"""Evaluate the outputs of any system: `python scripts/evaluate.py table=NAME outputs=DIR references=DIR output=REPORT`.

The tables `synthetic_hicodit`, `synthetic_talker` and `synthetic_codec` first generate outputs for held-out clips of a
synthetic corpus.
"""

from __future__ import annotations

if __name__ == "__main__":
    import environment  # noqa: F401 -- before anything that may be missing

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from engine.codec import load_codec
from engine.config import CONFIGS, compose, plain
from engine.device import count_devices, pick_device
from engine.errors import UserError, printable, run_cli
from engine.evaluation.clips import Clip, read_clips, read_corpus, system_facts, with_exchanged
from engine.evaluation.generate import ALL_BATCHES, generate_on_devices
from engine.evaluation.measure import Results, measure
from engine.evaluation.paper_tables import PaperTable, paper_lines, read_paper_tables
from engine.evaluation.report import write_report
from engine.evaluation.resynthesis import write_resynthesis
from engine.evaluation.summary import comparison_lines, headline, summarise, table_lines
from engine.evaluation.workers import Workers
from engine.files import writable, write_json
from engine.instantiate import target
from engine.metrics.metric import Metric
from engine.metrics.registry import metrics_of, protocol_of
from engine.processes import usable_cores
from engine.program import run_program, runs
from engine.record import origin, portable, write_record
from engine.settings import ClusterConfig, Limits, require_choice, set_limits

HELP = """
Compute a table of metrics for the outputs of any system, from two folders or a manifest. The table has 95 % intervals,
a row for the ground truth, and the rows of the paper. OUTPUT gets report.html (one file, no network needed),
results.json and a cache: the same command continues where it stopped. Unusable files, and metrics whose network was not
downloaded, are listed and skipped; the exit code is 1 if a file was skipped, 2 if there are no results.

A manifest has a clip per line, {"id": ..., "text": ..., "speaker": ...}; its files are ID.wav or ID.mp4 in outputs= and
references=, or those that output, reference and video name (paths from the manifest's folder). Several systems side by
side, with tests that say which figures show one to be better: outputs={one: DIR, other: DIR}. model=NAME generates the
outputs first, in float32 unless generate.precision says otherwise; systems= several of them.

table=synthetic_hicodit, synthetic_talker and synthetic_codec generate outputs for held-out clips of corpus=. The last
has all bundled codecs; model=rvq_codec, whisperx_vae or lia_x chooses one of them.

Examples:
python scripts/evaluate.py table=synthetic_hicodit clips=40
python scripts/evaluate.py table=synthetic_talker only=[t2av,tts] split=[seen,unseen] generate.weights=runs/own/release
python scripts/evaluate.py table=hicodit outputs=spoken references=true manifest=test.jsonl output=report
python scripts/evaluate.py table=hicodit outputs="{ours: a, theirs: b}" references=true output=report
python scripts/evaluate.py table=codec metrics=[pesq_wide,stoi] outputs=decoded references=true output=report
"""

MODELS = {"hicodit": "hicodit.evaluate", "talker_t2av": "talker_t2av.evaluate"}
CODECS = {  # class, and the bundled release
    "rvq_codec": ("rvq_codec.codec.RVQCodec", "assets/rvq_speech"),
    "whisperx_vae": ("whisperx_vae.codec.WhisperXVAE", "assets/whisperx_vae_speech"),
    "lia_x": ("lia_x.codec.LiaX", "assets/lia_x_real"),
}
ROOT = Path(__file__).resolve().parents[1]
ARGUMENTS = {  # arguments of protocols: classes of packages that `engine` does not import
    "wavlm": "talker_t2av.speaker.encoder.WavLMEncoder",
    "drawn": "corpora.synthetic.mouth_opening.MouthReader",
    "landmarks": "engine.metrics.lips.LipOpening",
}


@hydra.main(config_path=str(CONFIGS), config_name="evaluate", version_base="1.3")
@runs(output="output")
def evaluate_splits(config: DictConfig) -> int:
    """Evaluate each split of `config`. Return the exit code: 1 if an output could not be read."""
    splits = list(config.split) or [None]
    if config.corpus and splits == [None]:
        raise UserError(f"corpus={config.corpus} requires split=[NAME], such as [seen]")
    if config.corpus and not Path(config.corpus).is_dir():
        make = f"python scripts/make_synthetic_corpus.py --version 2 --out {config.corpus}"
        raise UserError(f"corpus={config.corpus} is not a folder: choose another one, or create it ({make})")
    output = Path(config.output)
    codes = []
    for split in splits:
        summary = evaluate(config, split, output / split if len(splits) > 1 else output)
        if len(splits) > 1:
            print(f"--- {split} ---")
        print_summary(summary)
        codes.append(1 if any(row["where"] == "file" for row in summary["left_out"]["files"]) else 0)
    return max(codes)


def main() -> int:
    return run_program(evaluate_splits, "evaluate", HELP, sys.argv[1:])


def evaluate(config: DictConfig, split: str | None, output: Path) -> dict[str, Any]:
    """Generate missing outputs, measure, and write report and results of one set of clips to `output`."""
    set_limits(Limits(**config.limits))
    columns = plain(config)["metrics"] or list(config.columns)
    columns = [columns] if isinstance(columns, str) else [*dict.fromkeys(columns)]
    device = str(pick_device(config.device))
    metrics = choose_metrics(config, columns, split, device)
    systems = systems_of(config)
    devices = count_devices(config.devices, config.device, config.executor)
    outputs = output_folders(config, systems)
    reference_rows = read_reference_rows(config, split)
    paper_tables = read_paper_tables(plain(config)["paper_tables"])
    if config.references and not config.manifest and output.resolve().is_relative_to(Path(config.references).resolve()):
        raise UserError(f"output={output} is within references=, where all files are clips: use another folder")
    clips = read_all_clips(config, split, outputs)
    cache = Path(config.cache) if config.cache else output / "cache"
    with writable(output), writable(cache, "cache"):
        if systems:
            outputs = {**outputs, **generate_outputs(config, systems, clips, output, devices)}
            clips = read_all_clips(config, split, outputs)
        clips = with_controls(config, clips)
        workers = config.workers or usable_cores()
        names = ", ".join(clips[0].takes) or "ground-truth speech alone"
        print(f"{len(clips)} clips, {names}, {workers} {'process' if workers == 1 else 'processes'} on {device}")
        count = min(workers, len(clips))
        with Workers(count if count > 1 else 0) as processes:
            results = measure(clips, dict.fromkeys(metrics.values()), cache, map_function=processes.map)
        metrics = with_free_words(metrics, results)
        summary = summarise(clips, results, metrics, config.resamples, config.compare)
        if not summary["figures"]:
            print_left_out(summary)
            raise UserError("no metric of the table could be computed, for the reasons above")
        summary["notes"] += protocol_notes(metrics, summary["figures"], reference_rows, paper_tables)
        settings = plain(config)
        summary |= {
            "title": config.title or f"Evaluation: {', '.join(clips[0].takes) or 'true speech'}",
            "paper": {
                name: row
                for name, row in reference_rows.items()
                if any(row.get(figure) is not None for figure in summary["figures"])
            },
            "paper_tables": [asdict(table) for table in paper_tables],
            "count": len(clips),
            "speakers": {clip.id: clip.speaker for clip in clips},
            "about_systems": {name: system_facts(folder) for name, folder in outputs.items()},
            **origin(device),
            "settings": {k: settings[k] for k in ("columns", "protocol", "clips", "resamples", "model", "generate")},
            "output": str(output),
        }
        write_json(output / "results.json", portable(summary))
        write_report(output / "report.html", summary, clips, config.media)
    if config.record:
        record = Path(f"{config.record}-{split}" if split else config.record)
        settings = summary["settings"]
        write_record(record.parent, record.name, summary["title"], headline(summary), device, settings=settings)
    return summary


def read_all_clips(config: DictConfig, split: str | None, outputs: Mapping[str, Path]) -> list[Clip]:
    """Read the clips of a split of the corpus, or those of the manifest or the reference folder."""
    if config.corpus:
        return read_corpus(Path(config.corpus), split, outputs, config.clips)
    manifest = Path(config.manifest) if config.manifest else None
    references = Path(config.references) if config.references else None
    return read_clips(manifest, references, outputs, config.clips)


def generate_outputs(
    config: DictConfig,
    systems: Mapping[str, tuple[str, dict[str, Any]]],
    clips: Sequence[Clip],
    output: Path,
    devices: int,
) -> dict[str, Path]:
    """Generate the missing outputs of each system on `devices` devices. Return the folder of each system."""
    ray = ClusterConfig(**config.ray) if config.executor == "ray" else None
    folders = {}
    for name, (model, settings) in systems.items():
        folders[name] = output / "outputs" / (name if config.systems else "")
        write = partial(generate, model, clips, folders[name], settings)
        generate_on_devices(write, config.device, devices, ray)
    return folders


def with_controls(config: DictConfig, clips: list[Clip]) -> list[Clip]:
    """Remove the source videos with `video=output`, and add control systems with `exchanged=true`."""
    if config.video == "output":  # the frames of the source would be compared with themselves
        clips = [
            replace(clip, takes={name: replace(take, source=None) for name, take in clip.takes.items()})
            for clip in clips
        ]
    return with_exchanged(clips) if config.exchanged else clips


def systems_of(config: DictConfig) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return (model, settings) of each system to generate."""
    wanted = plain(config)
    systems = wanted["systems"] or ({config.model: {}} if config.model else {})
    known = (*MODELS, *CODECS)
    require_choice("model", config.model or "hicodit", known)
    if config.model in CODECS:  # from a table with systems of several codecs, those of this one
        systems = {name: own for name, own in systems.items() if own.get("model", config.model) == config.model}
    for name in wanted["only"] or ():
        require_choice("only", name, systems)
    found = {}
    for name, own in systems.items():
        if name in (wanted["only"] or systems):
            model = own.get("model") or config.model
            require_choice(f"systems.{name}.model", model, known)
            for key in own:
                require_choice(f"systems.{name}", key, {"model", *wanted["generate"]})
            shared = wanted["generate"] if model == config.model else {}
            found[name] = model, {**shared, **{k: v for k, v in own.items() if k != "model"}}
    return found


def generate(
    model: str,
    clips: Sequence[Clip],
    folder: Path,
    settings: Mapping[str, Any],
    device: str,
    chosen: slice = ALL_BATCHES,
) -> None:
    """Write the missing outputs of a model for clips to `folder`. `chosen` selects the batches to write."""
    if model in MODELS:
        import_module(MODELS[model]).write_outputs(clips, folder, device, chosen=chosen, **settings)
        return
    kind, bundled = CODECS[model]
    codec = load_codec(settings.get("weights") or ROOT / bundled, {model: target(kind)}).to(device)
    write_resynthesis(codec, clips, folder, settings.get("weights"), settings.get("levels"), chosen)


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


def with_free_words(metrics: Mapping[str, Metric], results: Results) -> dict[str, Metric]:
    """Add the WER of sentences outside of the grammar, next to that of sentences within it."""
    rows = [row for by_clip in results.rows.get("WordErrors", {}).values() for row in by_clip.values()]
    if "wer" not in metrics or "wer_free" in metrics or not any("wer_free" in row for row in rows):
        return dict(metrics)
    figures = [name for figure in metrics for name in ((figure, "wer_free") if figure == "wer" else (figure,))]
    return {figure: metrics.get(figure, metrics["wer"]) for figure in figures}


def read_reference_rows(config: DictConfig, split: str | None) -> dict[str, dict[str, float | None]]:
    """Return the rows of target values and of the paper's values by name. A row maps figures to values."""
    rows = {f"paper: {name}": dict(zip(config.columns, values)) for name, values in config.paper.items()}
    true = [name for name in rows if "true speech" in name]
    if config.true_speech is not None:
        chosen = [name for name in true if config.true_speech in name]
        if not chosen:
            known = ", ".join(n.removeprefix("paper: ").removesuffix(" true speech") for n in true) or "none"
            raise UserError(f"true_speech={config.true_speech} is not a ground-truth row of the table; choose {known}")
        rows = {name: row for name, row in rows.items() if name not in true or name in chosen}
    aim = config.aim.get(split or "")
    return ({"aim": dict(aim)} if aim else {}) | rows


def protocol_notes(
    metrics: Mapping[str, Metric], figures: Iterable[str], paper: Mapping[str, Any], tables: Sequence[PaperTable]
) -> list[str]:
    """Return which figures of the paper were computed with another protocol than in this evaluation."""
    stated = {f for name, row in paper.items() if name.startswith("paper: ") for f in row if row[f] is not None}
    stated = stated.union(*(table.stated for table in tables))
    if not stated:
        return []
    table = [f"table={HydraConfig.get().runtime.choices.table}"] if HydraConfig.initialized() else []
    defaults = compose("evaluate", table).protocol
    notes = []
    for metric, names in metrics_of([*figures]).items():
        own = protocol_of(metric, defaults)
        here = metrics[names[0]].kind
        titles = ", ".join(metric.figures[f].title for f in names if f in stated)
        if own != here and titles:
            notes.append(f"the paper's {titles} by {own}, those above by {here}: not comparable")
    return notes


def choose_metrics(config: DictConfig, figures: list[str], split: str | None, device: str) -> dict[str, Metric]:
    """Return the metric that measures each figure, with the protocol selected in `config`.

    Raises:
        UserError: If a protocol is unknown, or its grammar is missing.
    """
    chosen = {}
    given = plain(config.protocol)
    grammar = config.grammar or (f"{config.corpus}/grammar.jsgf" if config.corpus else "")
    arguments = {"grammar": grammar, "shards": config.voices.get(split or ""), **ARGUMENTS}
    given |= {"own_voice_first": "shards"} if arguments["shards"] else {}
    for metric, names in metrics_of(figures).items():
        protocol = protocol_of(metric, given)
        if protocol not in metric.protocols:
            raise UserError(f"protocol.{names[0]}={protocol} is unknown; choose {', '.join(metric.protocols)}")
        if protocol == "grammar" and not Path(grammar).is_file():
            why = f"grammar={grammar} is not a file" if grammar else "none is given"
            raise UserError(f"protocol.wer=grammar requires grammar=FILE.jsgf: {why}")
        argument = f":{arguments[protocol]}" if protocol in arguments else ""
        chosen |= dict.fromkeys(names, metric(protocol + argument, Path(config.downloads), device))
    return {figure: chosen[figure] for figure in figures}


def output_folders(config: DictConfig, systems: Iterable[str]) -> dict[str, Path]:
    """Return the folder of each system in `outputs=`, whose outputs exist already."""
    outputs = config.outputs
    if outputs is None:
        return {}
    if isinstance(outputs, str):
        if outputs.startswith("{"):
            raise UserError(f"outputs={outputs} cannot be read: quote names and folders with special characters")
        return {Path(outputs).name or "output": Path(outputs)}
    if not isinstance(outputs, DictConfig) or not all(isinstance(value, str) for value in outputs.values()):
        raise UserError("outputs must be a folder, or several: {name: folder, other: folder}")
    if both := [name for name in systems if name in outputs]:
        raise UserError(f"outputs: {both[0]} is also the name of model=; choose another name")
    return {str(name): Path(folder) for name, folder in outputs.items()}


if __name__ == "__main__":
    run_cli(main)
