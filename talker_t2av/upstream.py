"""Upstream checkpoints of Talker-T2AV: files, tensor names, sizes, motion statistics, and warm starts.

Our parameters have the released names, so that loading consists of reading all shards, adding missing tensors, and
loading strictly.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.errors import UserError
from engine.official import numbered, rename_all, sizes_of
from engine.untrusted import parse_json, safe_name
from talker_t2av.layers import Rotary

# two names of the same tensor
EMBEDDINGS = "llm.model.embed_tokens.weight"
LM_HEAD = "llm.lm_head.weight"
ROTARY = ".rope.w"
FOREIGN = ("pretrained_speech_encoder.", "spk.")  # codec and speaker encoder, which are loaded from other files

# Files of the released programs: description, file names, and a substring that only occurs in their tensor names.
FILES = {
    "model": ("the Talker-T2AV model", ("*.safetensors",), "speech_cfm.estimator."),
    "tokenizer": ("the tokenizer", ("tokenizer.json", "vocab.json"), ""),
    "speech": ("the WhisperX-VAE checkpoint", ("*.ckpt",), "CodecEnc."),
    "motion": ("the LIA-X checkpoint", ("*.pt",), "dec.direction.weight"),
    "speaker": ("the WavLM speaker encoder", ("*.pth",), "feature_extract.model."),
}
HEADER_BYTES = 16_000_000  # bytes within which safetensors and torch files list their tensors

# Mean and standard deviation of the 40 motion channels that the released weights were trained with (Apache-2.0).
MOTION_MEAN = (
    0.006364349, 0.017484829, 0.016396947, -0.0135359485, -0.024186552, 0.00027653738, 0.0010602104, 0.01698656,
    -0.010986847, 0.00738304, -0.0248002, 0.017999398, -0.00080293656, -0.023244526, 0.006335761, -0.12834275,
    0.061169486, -0.0069934144, 0.7322096, -0.030482953, 0.012083354, -0.008843656, 0.0015558308, -0.0811736,
    -0.0001160976, 0.016840026, -0.0031718193, -0.080952965, -0.044832345, -0.118288256, 0.00041253163, -0.006176285,
    -0.0065168105, 0.27377605, 0.012853871, -0.050262515, -0.0031032823, 0.12046479, -0.046895456, -0.19978091,
)  # fmt: skip
MOTION_STD = (
    0.08454379, 0.061220236, 0.075378954, 0.120993495, 0.06523917, 0.02, 0.058821242, 0.04242331,
    0.054054204, 0.049027972, 0.072275884, 0.052725237, 0.027802138, 0.053579222, 0.02444918, 0.41529363,
    0.18271528, 0.0379854, 0.7906062, 0.051438842, 0.05636029, 0.08587122, 0.02, 0.11827056,
    0.084743544, 0.06498329, 0.03281063, 0.11960393, 0.2869649, 0.18533331, 0.047593683, 0.09716572,
    0.02, 0.67435014, 0.02, 0.1646887, 0.049828455, 0.7265424, 0.108559966, 0.4020769,
)  # fmt: skip


def find_upstream(folder: Path, part: str) -> Path:
    """Find the file in `folder` or its subfolders that contains a part of `FILES`, identified by its tensor names.

    The file with the shortest path is used. For sharded checkpoints the folder is returned. A tokenizer next to the
    model is preferred.
    """
    what, patterns, mark = FILES[part]
    found = [path for pattern in patterns for path in folder.rglob(pattern)]
    found.sort(key=lambda path: (len(path.parts), path))
    if part == "tokenizer":
        model = find_upstream(folder, "model")
        found.sort(key=lambda path: path.parent not in (model, model.parent))
    for path in found:
        if mark.encode() in _tensor_names(path):
            return path.parent if re.fullmatch(r".*-\d+-of-\d+\.safetensors", path.name) else path
    raise UserError(
        f"{folder} does not contain {what} (a file {patterns[0]}): download it with "
        f"python scripts/download_checkpoints.py talker_t2av --to {folder}"
    )


def _tensor_names(path: Path) -> bytes:
    """Read the start of a checkpoint, which contains the tensor names."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else HEADER_BYTES
        return file.read(min(length, HEADER_BYTES))


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors of a file, or of the `*.safetensors` files in a folder, merged in alphabetical order of the
    files.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path} has no *.safetensors file: expected the folder of the downloaded checkpoint")
    for name in _expected_shards(path, files):
        if not (path / name).is_file():
            raise UserError(f"{path} does not contain the shard {name}: copy or download it again")
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged ({error}); copy or download it again") from error
    return state


def _expected_shards(path: Path, files: list[Path]) -> list[str]:
    """Return the names of all shards, from the index or from the numbering of the files."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(parse_json(index.read_bytes(), index)["weight_map"].values())
            return sorted(safe_name(name, f"{index}: a file's name") for name in names)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is damaged ({error!r}); download it again") from error
    numbered = re.fullmatch(r"(.*-)\d+(-of-)(\d+)(\.safetensors)", files[0].name)
    if path.is_file() or not numbered:
        return []
    start, of, total, end = numbered.groups()
    return [f"{start}{i:0{len(total)}d}{of}{total}{end}" for i in range(1, int(total) + 1)]


def complete(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Add keys that a file may not contain (tied output layer, rotary tables), and remove those of other models."""
    out = {key: value for key, value in state.items() if not key.startswith(FOREIGN)}
    if EMBEDDINGS in out:
        out[LM_HEAD] = out[EMBEDDINGS]
    for name, module in model.named_modules():
        if isinstance(module, Rotary):
            out.setdefault(f"{name}.w", module.table("cpu"))
    return out


def without_tied_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors to store in a release: without the tied output layer and exact rotary tables."""
    exact = {f"{n}.w" for n, m in model.named_modules() if isinstance(m, Rotary) and m.w.equal(m.table(m.w.device))}
    return {k: v for k, v in model.state_dict().items() if k != LM_HEAD and k not in exact}


def upstream_fields(state: dict[str, Tensor]) -> dict[str, Any]:
    """Infer fields of `TalkerConfig` from the tensor shapes of a released checkpoint.

    The number of heads is inferred from the rotary tables, if any. Other fields, such as patch size, delay and context,
    have the published values.
    """
    with sizes_of("a Talker-T2AV checkpoint"):
        vocabulary, width = state[EMBEDDINGS].shape
        layer = "llm.model.layers.0."
        head_dim = len(state[layer + "self_attn.q_norm.weight"])
        fields = {
            "llm": {
                "vocab_size": vocabulary,
                "hidden_size": width,
                "head_dim": head_dim,
                "num_attention_heads": len(state[layer + "self_attn.q_proj.weight"]) // head_dim,
                "num_key_value_heads": len(state[layer + "self_attn.k_proj.weight"]) // head_dim,
                "intermediate_size": len(state[layer + "mlp.gate_proj.weight"]),
                "num_hidden_layers": len(numbered(state, "llm.model.layers.{}.input_layernorm.weight")),
            },
            "speech_dim": state["projector_speech.linear1.weight"].shape[1],
            "motion_dim": state["projector_motion.linear1.weight"].shape[1],
            "speaker_dim": state["speech_cfm.estimator.global_cond_proj.weight"].shape[1],
            "encoder_layers": len(numbered(state, "speech_patch_encoder.blocks.{}.norm1.scale")),
            "head_layers": len(numbered(state, "speech_cfm.estimator.decoder.blocks.{}.norm1.scale")),
        }
    for field, owner in (("encoder_heads", "speech_patch_encoder"), ("head_heads", "speech_cfm.estimator.decoder")):
        table = state.get(owner + ROTARY)
        if table is not None:
            fields |= {field: width // (2 * table.shape[1]), "max_positions": len(table)}
    return fields


WARM_STARTS = {  # renaming rules by kind of checkpoint
    "qwen": ((r"^", "llm."),),  # in the Hugging Face format; its output layer is tied or unused
    "tts": (  # the speech-only predecessor, whose single head was called `motion_cfm`
        (r"^motion_cfm\.", "speech_cfm."),
        (r"\.spk_proj\.", ".global_cond_proj."),
        (r"patch_encoder\.in_proj\.", "patch_encoder.input_proj."),
        (r"^patch_encoder\.", "speech_patch_encoder."),
    ),
    "projector": ((r"first_motion_proj", "global_cond_proj"), (r"^patch_encoder\.", "speech_patch_encoder.")),
}


def warm_start(model: nn.Module, folder: str | Path, kind: str) -> list[str]:
    """Load matching tensors from a safetensors checkpoint of `kind`. Return their names in `model`.

    Args:
        kind: "qwen", Qwen3 in the Hugging Face format, which must contain the whole language model; "tts", the
            speech-only predecessor; or "projector". A joint checkpoint cannot be used as "tts": its motion head would
            be copied into the speech head.
    """
    if kind not in WARM_STARTS:
        raise UserError(f"warm start kind {kind!r} is unknown; choose {', '.join(WARM_STARTS)}")
    state = read_safetensors(folder)
    own = model.state_dict()
    if kind == "tts" and any(key.startswith("speech_cfm.") for key in state):
        raise UserError(f"{folder} is not a speech-only checkpoint: it has a motion head, too")
    if kind == "qwen":
        _check_qwen(model, Path(folder), state)
    renamed = rename_all(state, WARM_STARTS[kind])
    fits = {key: value for key, value in renamed.items() if key in own and own[key].shape == value.shape}
    if not fits:
        raise UserError(f"{folder} has no tensor in common with the model: it is not a {kind} checkpoint of this size")
    model.load_state_dict(fits, strict=False)
    return sorted(fits)


def _check_qwen(model: nn.Module, folder: Path, state: dict[str, Tensor]) -> None:
    """Raise UserError if a tensor of the language model is missing, or it has other sizes or another rotary base."""
    for key, value in model.llm.model.state_dict().items():
        found = state.get(f"model.{key}")
        if found is None:
            raise UserError(f"{folder} is not a Qwen3 in the Hugging Face format: it has no tensor model.{key}")
        if found.shape != value.shape:
            raise UserError(
                f"{folder}: model.{key} is of {list(found.shape)}, task.model.llm requires {list(value.shape)}: set "
                "task.model.llm to the sizes in its config.json"
            )
    config = folder / "config.json"
    if config.is_file():
        said = parse_json(config.read_bytes(), config)
        ours = model.llm.config.rope_parameters["rope_theta"]
        base = said.get("rope_theta") or (said.get("rope_parameters") or {}).get("rope_theta")
        if base is not None and base != ours:
            raise UserError(
                f"{config} has rope_theta={base}, task.model.llm has {ours:g}: set task.model.llm.rope_theta"
            )
