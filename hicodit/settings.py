"""Settings of `infer.py` for HiCoDiT, validated before PyTorch is imported, which takes seconds."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from engine.config import plain, read_preset
from engine.errors import UserError
from engine.faces.detectors import DETECTORS, LANDMARKS
from engine.faces.track import MOST_FACES, read_boxes, read_face, track_of_boxes
from engine.files import CHECKOUT, writable
from engine.hub import check_release
from engine.media.ffmpeg import require_stream
from engine.settings import (
    FACE_BOX,
    SEED,
    SEEDS,
    WHICH_FACE,
    WORD_FILES,
    Group,
    NamedJob,
    RunConfig,
    group,
    make,
    override,
    set_limits,
    setting,
)

BUNDLED = CHECKOUT / "assets" / "hicodit_tiny"
METHODS = {  # functions of hicodit/samplers.py
    "euler": "as in the paper",
    "confidence": "as in MaskGIT",
}
GUIDANCE_FORMS = ("literal", "normalised")  # see hicodit/guidance.py
TRACK_SUFFIXES = "_face.png", "_face.json"  # suffixes of the image and the JSON file of a face track
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg", ".mpeg")


@dataclass(frozen=True)
class SamplerConfig(Group, prefix="sampler."):
    """Settings of the sampler."""

    method: str = setting(
        "euler",
        choices=tuple(METHODS),
        about=" or ".join(f"{name} ({description})" for name, description in METHODS.items()),
    )
    steps: int = setting(
        64, 1, 1000, "sampling steps (the paper: 64); euler adds a final step that reveals all remaining tokens"
    )
    temperature: float = setting(1.0, 0.0, 100.0, "temperature of token sampling; 0: always the most likely token")
    choice_noise: float = setting(
        4.5, 0.0, 1000.0, "confidence: scale of the Gumbel noise for ranking positions, annealed to 0"
    )
    window: int = setting(
        3, 2, 60, "length of a sampling window in seconds; windows of longer clips overlap by one second"
    )
    end: float = setting(1e-5, 1e-9, 0.5, "final diffusion time of euler, and the minimum time input of the network")


@dataclass(frozen=True)
class GuidanceScales(Group, prefix="guidance."):
    """Guidance scales and form. The paper uses 2.5, 1.25, 1.5, 2.0 for LRS3, and 2.25 for `all` on LRS2."""

    all: float = setting(1.0, -100.0, 100.0, "guidance scale of all conditions together")
    identity: float = setting(0.0, -100.0, 100.0, "guidance scale of the identity")
    expression: float = setting(0.0, -100.0, 100.0, "guidance scale of the expression")
    lip: float = setting(0.0, -100.0, 100.0, "guidance scale of the lip motion")
    guidance_form: str = setting(
        "normalised", choices=GUIDANCE_FORMS, about="literal (product of scores) or normalised (weighted posteriors)"
    )

    def exponents(self) -> dict[str, float]:
        """Return the exponent of each branch. Branches with exponent 0 are skipped."""
        singles = self.identity + self.expression + self.lip
        base = 2.0 if self.guidance_form == "literal" else 1.0
        values = {"none": base - self.all - singles, "all": self.all}
        values |= {"identity": self.identity, "expression": self.expression, "lip": self.lip}
        return {branch: value for branch, value in values.items() if value != 0}

    @property
    def branches(self) -> tuple[str, ...]:
        """Branches that have to be evaluated."""
        return tuple(self.exponents())


def require_compatible(sampler: SamplerConfig, guidance: GuidanceScales) -> None:
    """Raise UserError if the sampler does not support the form of guidance."""
    if guidance.guidance_form == "literal" and sampler.method != "euler":
        raise UserError(
            "guidance.guidance_form=literal changes the unmasking schedule: use sampler.method=euler, or "
            "guidance.guidance_form=normalised"
        )


LOOKAHEAD = 0.4, 0.04, 4.0, "stream: look-ahead of the audio in seconds of video"


@dataclass(frozen=True)
class StreamSettings(Group, prefix="stream."):
    """Settings of a stream, which samples a few tokens per hop."""

    lookahead: float = setting(*LOOKAHEAD)
    window: int = setting(
        2, 1, 60, "seconds of video that the network receives at each hop, rounded up to whole seconds"
    )
    steps: int = setting(4, 1, 1000, "sampling steps per hop")


def with_preset(name: str, sampler: SamplerConfig, guidance: GuidanceScales) -> tuple[SamplerConfig, GuidanceScales]:
    """Override these settings with those of configs/sampler/NAME.yaml."""
    preset = read_preset("sampler", name)
    return override(sampler, preset.get("sampler", {})), override(guidance, preset.get("guidance", {}))


@dataclass(frozen=True)
class ClipConfig:
    """Settings of what to generate: model, clips, and overrides of the release's sampler and guidance."""

    model: str = setting("hicodit", about="hicodit or talker_t2av")
    weights: str | None = setting(
        None,
        about="release folder, or OWNER/NAME on the hub; null: the bundled release for real or for cartoon faces",
    )
    codec: str | None = setting(None, about="release folder of the tokenizer; null: the tokenizer of the weights")
    input: str | None = setting(None, about="a clip, or a folder of clips; null: the bundled silent clip")
    reference_audio: str | None = setting(
        None, about="recording of a reference voice; null: the voice is predicted from the face"
    )
    seed: int = setting(0, *SEEDS, SEED)
    stream: bool = setting(
        False,
        about="generate audio in hops of 160 ms without the whole clip: largest face, sampler=fast, no figure",
    )
    lookahead: float = setting(*LOOKAHEAD)
    face: str = setting("largest", about=f"{WHICH_FACE}; all: NAME_face1.wav and so on for each face")
    face_box: str | None = setting(None, about=FACE_BOX)
    detector: str | None = setting(None, about=f"{DETECTORS}; null: as in the training of the weights")
    face_landmarks: str | None = setting(
        None, about=f"landmarks in each frame: {LANDMARKS}; null: as in training, or with detector= the detector's"
    )
    debug: bool = setting(
        False, about="also write NAME_face.png and NAME_face.json, a visualisation and the data of the face track"
    )
    encoders: str | None = setting(
        None,
        about="folder of the AV-HuBERT, ArcFace and POSTER V2 files, for models that use them; null: as in training",
    )
    sampler: dict[str, Any] = group(SamplerConfig, unset=True, about="null: as in the release")
    guidance: dict[str, Any] = group(GuidanceScales, unset=True, about="null: as in the release")


@dataclass(frozen=True)
class InferConfig(RunConfig, ClipConfig):
    """Settings of `infer.py`."""

    unit = "clips"


def read_settings(config: DictConfig) -> tuple[InferConfig, list[NamedJob]]:
    """Return the settings and the named clips, after all checks that do not require loading a model."""
    c = make(InferConfig, plain(config))
    set_limits(c.limits)
    for key in ("weights", "codec", "encoders"):
        check_release(key, getattr(c, key))
    read_face(c.face)
    if c.stream:
        _check_stream(c)
        c = replace(c, batch_size=1)  # a stream is printed as soon as it ends
    elif c.lookahead != LOOKAHEAD[0]:
        raise UserError(f"lookahead={c.lookahead:g} is only used with stream=true: add it, or omit lookahead")
    if c.face_box is not None:
        track_of_boxes(read_boxes(c.face_box), 1)
    if c.reference_audio is not None:
        require_stream(c.reference_audio, "audio")
    clips = find_clips(c)
    if len(clips) == 1:
        require_stream(clips[0], "video")
    with writable(c.output):
        return c, [(str(clip), clip) for clip in clips]


def _check_stream(c: InferConfig) -> None:
    """Raise UserError for settings that streaming does not support, as it never processes a whole clip."""
    is_set = {
        "timestamps": c.timestamps,
        "face": c.face != "largest",
        "face_box": c.face_box,
        "face_landmarks": c.face_landmarks,
        "debug": c.debug,
    }
    is_set |= {f"sampler.{name}": value is not None for name, value in c.sampler.items() if name != "steps"}
    is_set |= {f"guidance.{name}": value is not None for name, value in c.guidance.items()}
    for name in (name for name, value in is_set.items() if value):
        raise UserError(f"stream=true does not support {name}: omit it")


def find_clips(c: InferConfig) -> list[Path]:
    """Return the clip, or the video files of a folder in alphabetical order, after checking the output paths."""
    source = Path(c.input or BUNDLED.parent / "demo" / "silent.mp4")
    try:
        source.stat()
    except OSError as error:
        raise UserError(f"no such file or folder: input={source} ({error.strerror})") from error
    if source.is_file():
        clips = [source]
    elif source.is_dir():
        clips = sorted(p for p in source.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES)
        if not clips:
            raise UserError(f"no clip in folder input={source}: looked for {', '.join(VIDEO_SUFFIXES)}")
    else:
        raise UserError(f"input={source} is neither a file nor a folder")
    owners: dict[Path, Path] = {}
    inputs = {os.path.realpath(file): file for file in (*clips, *_other_inputs(c))}
    suffixes = (".mp4", ".png", ".wav", *(TRACK_SUFFIXES if c.debug else ()), *(WORD_FILES if c.timestamps else ()))
    for clip in clips:
        stems = {stem_of(clip, number, c) for number in range(1, MOST_FACES + 1)}
        for target in (Path(c.output) / f"{stem}{suffix}" for stem in sorted(stems) for suffix in suffixes):
            other = owners.setdefault(target, clip)
            if other != clip:
                raise UserError(f"{other} and {clip} would both be written to {target}: rename one")
            if replaced := inputs.get(os.path.realpath(target)):
                raise UserError(f"output={c.output} would replace the input {replaced}: choose another folder")
            if target.is_dir():
                raise UserError(f"cannot write {target}: it is a folder")
            if len(os.fsencode(target.name)) > 255:
                raise UserError(f"the name of {clip} is too long for its outputs: rename it")
    return clips


def _other_inputs(c: InferConfig) -> list[Path]:
    """Return the files that a job reads besides its clips: the voice, boxes and landmarks."""
    paths = [Path(name) for name in (c.reference_audio, c.face_box, c.face_landmarks) if isinstance(name, str)]
    return [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*.json")))]


def stem_of(clip: Path, number: int, c: InferConfig) -> str:
    """Return the file name without suffix for a face of a clip. `number` is used if all faces are requested."""
    return f"{clip.stem}_face{number}" if c.face == "all" else clip.stem
