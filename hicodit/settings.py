"""Settings of `infer.py`, checked before PyTorch is imported, which takes seconds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from engine.batch_runner import WORD_FILES, RunConfig
from engine.config import plain, read_preset
from engine.errors import UserError
from engine.faces.detectors import DETECTORS, LANDMARKS
from engine.faces.track import MOST_FACES, read_boxes, read_face, track_of_boxes
from engine.files import writable
from engine.media.ffmpeg import require_stream
from engine.settings import FACE as WHICH_FACE
from engine.settings import FACE_BOX, SEED, SEEDS, Group, group, make, override, setting

BUNDLED = Path(__file__).resolve().parent.parent / "assets" / "hicodit_tiny"
METHODS = ("euler", "confidence")  # functions of hicodit/samplers.py
GUIDANCE_FORMS = ("literal", "normalised")  # see hicodit/guidance.py
FACE = "_face.png", "_face.json"  # endings of the picture and of the numbers of a face track
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg", ".mpeg")


@dataclass(frozen=True)
class SamplerConfig(Group, prefix="sampler."):
    """Settings of the sampler."""

    method: str = setting("euler", choices=METHODS, about="euler (the paper's) or confidence (MaskGIT's)")
    steps: int = setting(64, 1, 1000, "sampling steps (the paper: 64); euler adds a last one that leaves no mask")
    temperature: float = setting(1.0, 0.0, 100.0, "temperature of token sampling; 0: always the most likely token")
    choice_noise: float = setting(
        4.5, 0.0, 1000.0, "confidence: scale of the Gumbel noise that positions are ranked with, annealed to 0"
    )
    window: int = setting(
        3, 2, 60, "seconds sampled at once; longer clips are sampled in windows that overlap by one second"
    )
    end: float = setting(1e-5, 1e-9, 0.5, "diffusion time at which euler ends; no method shows the network less")


@dataclass(frozen=True)
class GuidanceScales(Group, prefix="guidance."):
    """Guidance scales and the form of the formula. The paper: 2.5, 1.25, 1.5, 2.0 for LRS3; 2.25 for `all` on LRS2."""

    all: float = setting(1.0, -100.0, 100.0, "guidance scale of all conditions together")
    identity: float = setting(0.0, -100.0, 100.0, "guidance scale of the identity alone")
    expression: float = setting(0.0, -100.0, 100.0, "guidance scale of the expression alone")
    lip: float = setting(0.0, -100.0, 100.0, "guidance scale of the lip motion alone")
    guidance_form: str = setting(
        "normalised", choices=GUIDANCE_FORMS, about="literal (product of scores) or normalised (weighted posteriors)"
    )

    def exponents(self) -> dict[str, float]:
        """Return the exponent of each branch; one of zero drops its branch."""
        singles = self.identity + self.expression + self.lip
        base = 2.0 if self.guidance_form == "literal" else 1.0
        values = {"none": base - self.all - singles, "all": self.all}
        values |= {"identity": self.identity, "expression": self.expression, "lip": self.lip}
        return {branch: value for branch, value in values.items() if value != 0}

    @property
    def branches(self) -> tuple[str, ...]:
        """Branches that have to be computed."""
        return tuple(self.exponents())


LOOKAHEAD = 0.4, 0.04, 4.0, "stream: seconds of pictures after a moment that its audio waits for"


@dataclass(frozen=True)
class StreamSettings(Group, prefix="stream."):
    """Settings of a stream, each hop of which samples a few tokens only."""

    lookahead: float = setting(*LOOKAHEAD)
    window: int = setting(2, 1, 60, "seconds of pictures that the network sees at each hop, rounded up to whole ones")
    steps: int = setting(4, 1, 1000, "sampling steps at each hop")


UNGUIDED = GuidanceScales()  # the conditional model alone


def with_preset(name: str, sampler: SamplerConfig, guidance: GuidanceScales) -> tuple[SamplerConfig, GuidanceScales]:
    """Override these settings with those of configs/sampler/NAME.yaml."""
    preset = read_preset("sampler", name)
    return override(sampler, preset.get("sampler", {})), override(guidance, preset.get("guidance", {}))


@dataclass(frozen=True)
class ClipConfig:
    """What to generate: model, clips, and changes to what the release stores of sampler and guidance."""

    model: str = setting("hicodit", about="hicodit or talker_t2av")
    weights: str | None = setting(
        None,
        about="release folder, or OWNER/NAME on the hub; null: the bundled one for filmed or cartoon faces",
    )
    codec: str | None = setting(None, about="release folder of the tokenizer; null: the one that the weights name")
    input: str | None = setting(None, about="a clip, or a folder of clips; null: the bundled silent clip")
    reference_audio: str | None = setting(
        None, about="recording of the voice to speak with; null: the voice is predicted from the face"
    )
    seed: int = setting(0, *SEEDS, SEED)
    stream: bool = setting(
        False, about="audio in hops of 160 ms while the pictures arrive, without access to the whole clip; no figure"
    )
    lookahead: float = setting(*LOOKAHEAD)
    face: str = setting("largest", about=f"{WHICH_FACE}; all: NAME_face1.wav and so on for each face")
    face_box: str | None = setting(None, about=FACE_BOX)
    detector: str | None = setting(None, about=f"{DETECTORS}; null: as in the training of the weights")
    face_landmarks: str | None = setting(
        None, about=f"landmarks in each frame: {LANDMARKS}; null: as in training, or with detector= the detector's"
    )
    debug: bool = setting(
        False, about="also write NAME_face.png and NAME_face.json, a picture and the numbers of the face track"
    )
    encoders: str | None = setting(
        None,
        about="folder of the AV-HuBERT, ArcFace and POSTER V2 files, for models that use them; null: as in training",
    )
    sampler: dict[str, Any] = group(SamplerConfig, unset=True, about="null: the release's setting")
    guidance: dict[str, Any] = group(GuidanceScales, unset=True, about="null: the release's setting")


@dataclass(frozen=True)
class InferConfig(RunConfig, ClipConfig):
    """Settings of `infer.py`."""


def read_settings(config: DictConfig) -> tuple[InferConfig, list[Path]]:
    """Return the settings of a job and its clips; all that can be checked without loading a model is checked."""
    c = make(InferConfig, plain(config))
    c.begin({"weights": c.weights, "codec": c.codec, "encoders": c.encoders})
    read_face(c.face)
    if c.stream:
        _check_stream(c)
    if c.face_box is not None:
        track_of_boxes(read_boxes(c.face_box), 1)
    if c.reference_audio is not None:
        require_stream(c.reference_audio, "audio")
    clips = find_clips(c)
    if len(clips) == 1:
        require_stream(clips[0], "video")
    with writable(c.output):
        return c, clips


def _check_stream(c: InferConfig) -> None:
    """Refuse settings that streaming does not use, as it never sees a whole clip."""
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
        raise UserError(
            f"stream=true has no {name}: it follows the largest face, and samples with the settings of sampler=fast"
        )


def find_clips(c: InferConfig) -> list[Path]:
    """Return the clip itself, or the video files of a folder in order of name; check the paths of their outputs."""
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
    inputs = {os.path.realpath(clip): clip for clip in clips}
    suffixes = (".mp4", ".png", ".wav", *(FACE if c.debug else ()), *(WORD_FILES if c.timestamps else ()))
    for clip in clips:
        stems = {stem_of(clip, number, c) for number in range(1, MOST_FACES + 1)}
        for target in (Path(c.output) / f"{stem}{suffix}" for stem in sorted(stems) for suffix in suffixes):
            other = owners.setdefault(target, clip)
            if other != clip:
                raise UserError(f"{other} and {clip} would both be written to {target}: rename one")
            if replaced := inputs.get(os.path.realpath(target)):
                raise UserError(f"output={c.output} would replace the clip {replaced} itself: choose another folder")
            if target.is_dir():
                raise UserError(f"cannot write {target}: it is a folder")
    return clips


def stem_of(clip: Path, number: int, c: InferConfig) -> str:
    """Return the name, without an ending, of the files of a face of a clip; `number` counts if all are wanted."""
    return f"{clip.stem}_face{number}" if c.face == "all" else clip.stem
