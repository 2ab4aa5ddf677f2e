"""Export of a training run to a release folder: averaged weights of a checkpoint, config, and a model card. Conversion
of releases: `compact` quantises the weights of one, `average` averages those of several.

At its start a run writes RUN/release.json with the contents of its release except for the weights. A release can then
be created from this file, a checkpoint and the log, without the model's code, its data or the training processes.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData
from omegaconf import OmegaConf
from torch import Tensor

from engine.errors import UserError
from engine.files import report_os_errors, write_json
from engine.hub import LIBRARY, TASKS
from engine.release import RELEASE_FILES, SCALE, read_release, release_kind, save_release, to_float16
from engine.training import checkpoint
from engine.training.task import ReleaseInfo, Task
from engine.untrusted import parse_json, read_json

# files in a run's folder
DESCRIPTION = "release.json"
FILES = "release_files"
# parameter names of PEFT
BASE = ".base_layer."
A = ".lora_A.default.weight"
B = ".lora_B.default.weight"

COMPACT_FROM = 4096  # minimum number of elements of a quantised tensor


def describe(run: Path, task: Task) -> None:
    """Write the contents of a future release, except for the weights, to the folder of the run."""
    release = task.release_info()
    files = run / FILES
    if release is None:
        return
    with report_os_errors(f"cannot write {files}"):
        shutil.rmtree(files, ignore_errors=True)
        files.mkdir(parents=True)
        task.release_files(files)
    write_json(run / DESCRIPTION, asdict(release))


def export(run: str | Path, folder: str | Path, step: int | None = None) -> Path:
    """Write the release of the newest complete checkpoint of a run, or of `step`. Return the folder of the checkpoint.

    This works in a single process for any parallelism of the run. The metrics are those of the last validation before
    the checkpoint.
    """
    run = Path(run)
    root = run / "checkpoints"
    found = checkpoint.newest(root) if step is None else checkpoint.folder_of(root, step)
    problem = "there is none" if found is None else checkpoint.damage(found) if step is not None else None
    if found is None or problem:
        raise UserError(f"{run} has no checkpoint to export{f' of step {step}' if step is not None else ''}: {problem}")
    try:
        release = ReleaseInfo(**read_json(run / DESCRIPTION))
    except (ValueError, TypeError) as error:
        raise UserError(f"{run / DESCRIPTION} cannot be read ({error}): was the run started by train.py?") from error
    try:
        state, info = checkpoint.read(found, ("model.", "ema."))
    except FileNotFoundError as error:
        raise UserError(f"{found} was deleted by the run (trainer.keep) while it was read: export again") from error
    averaged = {k.removeprefix("ema."): v for k, v in state.items() if k.startswith("ema.")}
    weights = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")} | averaged
    results, at = last_validation(run / "log.jsonl", info["step"])
    try:
        text = card(release, info, results, at)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{run} contains settings or metrics that train.py does not write ({error})") from error
    write(folder, release, weights, text, run / FILES)
    return found


def write(folder: str | Path, release: ReleaseInfo, state: Mapping[str, Tensor], text: str, files: Path | None) -> None:
    """Write a release in half precision from the state dict of a task, with `text` as its card and the files of
    `files`.
    """
    prefix = f"{release.module}."
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if release.lora_scale is not None:
        own = merged(own, release.lora_scale)
    kept = {k: v for k, v in own.items() if k not in release.left_out}
    save_release(folder, release.kind, release.config, to_float16(kept), text, files)


def merged(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return a state dict with the low-rank updates merged, W + scale * B A, under the original names."""
    out = {}
    for key, value in state.items():
        if key.endswith((A, B)):
            continue
        stem, inside, last = key.rpartition(BASE)
        if inside and last == "weight" and stem + A in state:
            value = value + scale * (state[stem + B].float() @ state[stem + A].float()).to(value.dtype)
        out[f"{stem}.{last}" if inside else key] = value
    return out


def last_validation(log: Path, step: int) -> tuple[dict[str, float], int]:
    """Return (metrics, step) of the last validation at or before `step`, or ({}, 0)."""
    found: tuple[dict[str, float], int] = {}, 0
    for _, record in read_log(log):
        figures = {k.removeprefix("validation/"): v for k, v in record.items() if k.startswith("validation/")}
        if figures and found[1] <= record["step"] <= step:
            found = figures, record["step"]
    return found


def read_log(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (line, record) of a run's log.jsonl. Damaged lines, such as those truncated by a kill, are skipped."""
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with suppress(UserError, OverflowError):
            record = parse_json(line, path)
            step = record.get("step") if isinstance(record, dict) else None
            if isinstance(step, int | float) and math.isfinite(step):
                yield line, record


def card(release: ReleaseInfo, info: Mapping[str, Any], results: Mapping[str, float], at: int = 0) -> str:
    """Return the text of the model card: description, usage, data, recipe and metrics.

    Args:
        info: metadata of the checkpoint: optional `step`, `config` and `code`.
        results: metrics of the validation after step `at`.
    """
    config = info.get("config") or {}
    step = info.get("step", 0)
    data = config.get("data") or {}
    trainer = config.get("trainer") or {}
    task = config.get("task") or {}
    dataset = str(data.get("root") or "held-out clips of the run")
    parts = [front_matter(release.kind, release.title, results, dataset)]
    parts += [f"# {release.title}", release.about, f"```python\n{release.usage}\n```"]
    if results:
        late = "" if at == step else f" (step {at:,}; the weights are of step {step:,})"
        rows = "".join(f"| {name} | {value:.4g} |\n" for name, value in sorted(results.items()))
        parts.append(f"## Results\n\nLast validation of the run{late}, averaged weights:\n\n| | |\n|---|---|\n{rows}")
    if data:
        commands = filter(None, (data.get("make") or {}).values())
        made = "".join(f"    python {' '.join(map(str, command))}\n" for command in commands)
        source = (data.get("train") or {}).get("_target_", "")
        root = f", `{data['root']}`" if data.get("root") else ""
        parts.append(f"## Data\n\n`{source}`{root}." + (f" Made with\n\n{made}" if made else ""))
    recipe = str(task.get("recipe") or "")
    if config.get("command"):
        recipe += f"\n\n    {config['command']}\n"
    if trainer:
        batch = f"{trainer.get('accumulate')} x {trainer.get('batch_size')}"
        recipe += f"\nStep {step:,} of {trainer.get('steps'):,}, {batch} samples per step and process, seed "
        recipe += f"{trainer.get('seed')}, {trainer.get('precision')}."
    if task.get("init"):
        how = "low-rank updates, merged" if release.lora_scale is not None else "all weights"
        recipe += f" Fine-tuned from `{task['init']}` ({how})."
    if info.get("code"):
        recipe += f" Code: {info['code']}."
    if recipe:
        parts.append(f"## Recipe\n\n{recipe.strip()}")
    if config:
        parts.append(f"The run's whole config:\n\n```yaml\n{OmegaConf.to_yaml(OmegaConf.create(dict(config)))}```")
    parts.append("No licence is stated: choose one before publishing the weights.")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def front_matter(kind: str | None, title: str, results: Mapping[str, float], dataset: str) -> str:
    """Return the metadata of a model card as YAML front matter.

    `results` maps names of metrics to values on `dataset` and becomes the model-index.
    """
    task, tags = TASKS.get(kind, (None, ()))
    figures = [
        EvalResult(
            task_type=task or "other", dataset_type="held-out", dataset_name=dataset, metric_type=name,
            metric_name=name, metric_value=value,
        )
        for name, value in sorted(results.items())
    ]  # fmt: skip
    data = ModelCardData(
        model_name=title, eval_results=figures or None, library_name=LIBRARY, pipeline_tag=task, tags=[*tags] or None
    )
    return f"---\n{data.to_yaml()}\n---\n"


def compact(state: dict[str, Tensor], exact: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Return `to_float16(state)` with large matrices quantised to int8: a quarter of the size in float32.

    A tensor (R, ...) becomes int8 of the same shape and, under its name with `::scale`, one float32 scale per row: the
    maximum magnitude of the row divided by 127, so that the rounding error is at most 0.4 % of it. `read_release`
    dequantises.

    Args:
        exact: name prefixes of tensors that stay in half precision.
    """
    out = to_float16(state)
    for key, value in state.items():
        large = value.is_floating_point() and value.ndim >= 2 and value.numel() >= COMPACT_FROM
        if large and not key.startswith(exact):
            rows = value.detach().float().flatten(1)
            scale = rows.abs().amax(1).clamp_min(1e-12) / 127
            out[key] = (rows / scale[:, None]).round().to(torch.int8).view(value.shape)
            out[key + SCALE] = scale
    return out


def average(
    states: list[dict[str, Tensor]], weights: list[float], prefixes: tuple[str, ...] = ("",)
) -> dict[str, Tensor]:
    """Return the first state dict, with floating-point tensors whose names start with a prefix averaged over all state
    dicts.

    Args:
        weights: weight of each state dict in the average; they need not sum to 1.

    Raises:
        UserError: If names or shapes of the tensors differ, or no name starts with one of the prefixes.
    """
    first = states[0]
    shapes = [{name: value.shape for name, value in state.items()} for state in states]
    for other in shapes[1:]:
        unlike = sorted(name for name in shapes[0].keys() | other.keys() if shapes[0].get(name) != other.get(name))
        if unlike:
            raise UserError(
                f"the releases have different models: {unlike[0]} is missing from one of them or differs in shape; "
                "average releases of one model"
            )
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in first):
            raise UserError(f"--only {prefix}: no tensor name has this prefix; the first name is {min(first)}")
    names = [name for name, value in first.items() if name.startswith(prefixes) and value.is_floating_point()]
    averaged = {}
    for name in names:
        averaged[name] = sum(weight / sum(weights) * state[name] for weight, state in zip(weights, states))
    return first | averaged


def rewrite_release(source: Path, out: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Write a copy of a release with changed tensors. The card and further files, such as a tokenizer, are copied."""
    kind = release_kind(source)
    card = source / "README.md"
    config, state = read_release(source, kind)
    with tempfile.TemporaryDirectory() as scratch:
        for path in source.iterdir():
            if path.is_file() and not path.is_symlink() and path.name not in RELEASE_FILES:
                shutil.copyfile(path, Path(scratch, path.name))
        save_release(out, kind, config, change(state), card.read_text() if card.is_file() else "", files=Path(scratch))
