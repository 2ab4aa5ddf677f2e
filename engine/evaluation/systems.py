"""The systems of an evaluation: models that generate outputs, and folders of outputs that exist already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from engine.config import plain
from engine.errors import UserError
from engine.evaluation.resynthesis import write_resynthesis
from engine.files import CHECKOUT
from engine.instantiate import target
from engine.settings import require_choice
from engine.untrusted import safe_name

ASSETS = CHECKOUT / "assets"
# Function of each model that writes its missing outputs, as a dotted name: `engine` imports no models. Its arguments
# are the clips, the folder of the outputs, the device, and by name the settings of the model and the slice `chosen` of
# the batches.
MODELS = {"hicodit": "hicodit.evaluate.write_outputs", "talker_t2av": "talker_t2av.evaluate.write_outputs"}
CODECS = {  # class and bundled release folder of each codec
    "rvq_codec": ("rvq_codec.codec.RVQCodec", ASSETS / "rvq_speech"),
    "whisperx_vae": ("whisperx_vae.codec.WhisperXVAE", ASSETS / "whisperx_vae_speech"),
    "lia_x": ("lia_x.codec.LiaX", ASSETS / "lia_x_real"),
}


def choose_systems(config: DictConfig, defaults: Mapping[str, Any]) -> dict[str, Callable[..., None]]:
    """Return the function that writes the missing outputs of each system to generate, with its settings.

    Its arguments are the clips, the folder of the outputs, the device, and by name the slice `chosen` of the batches.

    Args:
        config: settings of the evaluation.
        defaults: settings `generate` of the chosen table.

    Raises:
        UserError: If a model or a system is unknown, or a setting has no effect or is not one of the model.
    """
    wanted = plain(config)
    passed_on = str(OmegaConf.to_container(config, resolve=False)["systems"])  # as in weights: "${generate.codec}"
    systems = wanted["systems"] or ({config.model: {}} if config.model else {})
    for name, own in systems.items():
        safe_name(name, "systems: a name")
        if not isinstance(own, dict):
            raise UserError(f"systems.{name}={own} must be settings, as in {{model: rvq_codec, levels: 2}}")
    known = (*MODELS, *CODECS)
    require_choice("model", config.model or "hicodit", known)
    if config.model in CODECS:  # from a table with systems of several codecs, those of this one
        systems = {name: own for name, own in systems.items() if own.get("model", config.model) == config.model}
    for name in wanted["only"] or ():
        require_choice("only", name, systems)
    changed = [
        key
        for key, value in wanted["generate"].items()
        if value != defaults[key] and f"generate.{key}" not in passed_on
    ]
    chosen = wanted["only"] or [*systems]
    if changed and not any(systems[name].get("model", config.model) == config.model for name in chosen):
        raise UserError(f"generate.{changed[0]} has no effect: no outputs are generated with it; set model=NAME")
    found = {}
    for name in chosen:
        own = {key: value for key, value in systems[name].items() if key != "model"}
        model = systems[name].get("model") or config.model
        require_choice(f"systems.{name}.model", model, known)
        shared = wanted["generate"] if model == config.model else {}
        write = target(MODELS[model]) if model in MODELS else partial(write_resynthesis, *CODECS[model])
        accepted = [key for key in defaults if key in signature(write).parameters]
        for prefix, keys in {f"systems.{name}.": own, "generate.": changed if shared else ()}.items():
            for key in keys:
                if key not in accepted:
                    raise UserError(f"{prefix}{key}: {model} has no such setting; choose {', '.join(accepted)}")
        settings = {**shared, **own}
        found[name] = partial(write, **{key: settings[key] for key in accepted if key in settings})
    return found


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
