"""What is asked of generation: the four jobs, the sampler's settings, one row's inputs, and the official departures.

Axes: F frames, Ds / Dm speech / motion channels, G speaker embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from engine.bounds import bounded, check_bounds
from talker_t2av.model import FPS


@dataclass(frozen=True)
class Mode:
    """What becomes of each stream."""

    speech: Literal["generated", "given"]
    motion: Literal["generated", "given", "absent"]

    @property
    def open_ended(self) -> bool:
        """Nothing given tells the length: the stop head does."""
        return "given" not in (self.speech, self.motion)


MODES = {
    "t2av": Mode("generated", "generated"),
    "tts": Mode("generated", "absent"),
    "a2v": Mode("given", "generated"),
    "v2a": Mode("generated", "given"),
}


@dataclass(frozen=True)
class Sampling:
    """Of both diffusion heads; the defaults are the released command line's.

    steps: of the solver. temperature: of the noise. guidance: scale; at 1 no unconditional branch is evaluated.
    """

    steps: int = bounded(1, 1000, default=10)
    temperature: float = bounded(0.0, 2.0, default=0.3)
    guidance: float = bounded(0.0, 20.0, default=2.0)

    def __post_init__(self) -> None:
        check_bounds(self, "sampling.")


@dataclass(frozen=True)
class Compat:
    """Where the official routines depart from what the model is trained on; the defaults are training's way.

    prepend_task: the task embedding is the first token; else it is added to the first slot that is known beforehand,
        and absent where there is none.
    prefix_motion: those slots hold motion.
    motion_waits: tokens have no motion part before step `delay`, counted from the first generated slot.
    trim: speech ends with the motion, though the last `delay` slots hold more of it.
    stop_hits: hits in a row that end an utterance; what was drawn since the first is kept.
    first_test: step of the first stop test, at least.
    extra_patches: that may be generated beyond the reference's length; None: the reference is no limit.
    round_prefix: seconds of prefix become the nearest number of frames (half to even), else they are cut.
    whole_patches: a prefix is cut to whole patches.
    bf16_motion: reference motion is rounded to bfloat16.
    keeps_prefix: the result begins with the prefix.
    """

    prepend_task: bool = True
    prefix_motion: bool = True
    motion_waits: bool = False
    trim: bool = True
    stop_hits: int = 1
    first_test: int = 1
    extra_patches: int | None = None
    round_prefix: bool = True
    whole_patches: bool = True
    bf16_motion: bool = False
    keeps_prefix: bool = False

    def prefix_frames(self, seconds: float, available: int, patch_size: int) -> int:
        """Frames of a prefix of `seconds`, of the `available` ones of the reference."""
        frames = min(round(seconds * FPS) if self.round_prefix else int(seconds * FPS), available)
        return frames // patch_size * patch_size if self.whole_patches else frames

    def limit(self, reference: int, prefix: int, delay: int) -> int:
        """`Request.max_patches` after a reference of so many patches, of which `prefix` are known beforehand."""
        assert self.extra_patches is not None, "training's way has no limit that comes from a reference"
        return reference - prefix + self.extra_patches - delay


PAPER = Compat()
GENERATE_SPEECH = Compat(stop_hits=3, first_test=6, extra_patches=25, whole_patches=False, keeps_prefix=True)
GENERATE_SPEECH_MOTION = Compat(
    prefix_motion=False,
    motion_waits=True,
    trim=False,
    stop_hits=3,
    first_test=7,
    extra_patches=15,
    keeps_prefix=True,
)
SCRIPT = Compat(
    prepend_task=False,
    motion_waits=True,
    trim=False,
    stop_hits=3,
    first_test=7,
    extra_patches=15,
    round_prefix=False,
    bf16_motion=True,
    keeps_prefix=True,
)


@dataclass(frozen=True)
class Request:
    """One row.

    Attributes:
        prompt: text tokens before the placeholders.
        speaker: (G,) embedding of the voice.
        speech: (F, Ds) given latents: all of a given stream, the beginning of a generated one.
        motion: (F, Dm) likewise, normalised.
        first_motion: (Dm,) the reference picture's motion, normalised; not needed for TTS.
        prefix: slots that are known beforehand.
        max_patches: most patches to generate after the prefix; not used where a given stream tells the length.
        min_patches: fewest.
        seed: of the noise.
    """

    prompt: Sequence[int]
    speaker: Tensor
    speech: Tensor
    motion: Tensor
    first_motion: Tensor | None = None
    prefix: int = 0
    max_patches: int = 188
    min_patches: int = 1
    seed: int = 0
