"""Types of a generation request: the four modes, sampling settings, stopping rules, and the inputs of a row.

Axes: F frames, Ds / Dm speech / motion channels, G speaker embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from engine.settings import Group, setting

if TYPE_CHECKING:
    from torch import Tensor  # importing it takes seconds

TTS, T2AV = range(2)  # row indices of the task embedding
Stream = Literal["speech", "motion"]
# Interleaved streams, an ablation of the paper (arXiv 2604.23586). With order=add, which the paper uses, a patch of
# 160 ms is one token, the sum of the tokens of both streams. With these orders it is two tokens, and the second stream
# is conditioned on the first stream's patch of the same time. Without motion, a patch is always one token.
ORDERS: dict[str, tuple[Stream, Stream]] = {"av": ("speech", "motion"), "va": ("motion", "speech")}


def tokens_per_patch(order: str, has_motion: bool) -> int:
    """Return the number of tokens per patch, which is two for interleaved streams."""
    return 2 if order in ORDERS and has_motion else 1


@dataclass(frozen=True)
class Mode:
    """State of each stream: generated, given or absent."""

    speech: Literal["generated", "given"]
    motion: Literal["generated", "given", "absent"]

    @property
    def task(self) -> int:
        """Return the row of the task embedding. V2A and A2V use that of T2AV, as in training both ground-truth streams
        are input.
        """
        return TTS if self.motion == "absent" else T2AV

    @property
    def open_ended(self) -> bool:
        """Whether the stop head determines the length, instead of a given stream."""
        return "given" not in (self.speech, self.motion)


MODES = {
    "t2av": Mode("generated", "generated"),
    "tts": Mode("generated", "absent"),
    "a2v": Mode("given", "generated"),
    "v2a": Mode("generated", "given"),
}


@dataclass(frozen=True)
class Sampling(Group, prefix="sampling."):
    """Sampling settings of both diffusion heads. The defaults are those of the released command line."""

    steps: int = setting(10, 2, 1000, "steps of the flow solver, the first of which is skipped (released model: 10)")
    temperature: float = setting(0.3, 0.0, 2.0, "scale of the initial noise (released model: 0.3)")
    guidance: float = setting(
        2.0, 0.0, 20.0, "scale of classifier-free guidance (released model: 2.0); 1: off, twice as fast"
    )
    unguided: int = setting(0, 0, 1000, "number of final solver steps without guidance, at half the cost")
    text_bytes: int = setting(
        190,  # slightly less than 30 s of slow speech
        8,
        2000,
        "longer texts are spoken in parts (sentences, else clauses, else words) with short pauses between; above 190, "
        "a part may not fit into the 30 s that the model was trained on",
    )
    particles: int = setting(
        1,
        1,
        256,
        "v2a: number of particles, candidates of the speech that are resampled to match the face; 1: none",
    )
    particle_temperature: float = setting(0.8, 0.0, 2.0, "v2a: scale of the initial noise with several particles")


@dataclass(frozen=True)
class StoppingRules:
    """Stopping rules of a row. The defaults follow training; talker_t2av/official.py has those of the official
    routines.

    Attributes:
        stop_hits: number of consecutive positive stop predictions that end a row. Patches generated between the first
            and the last are kept.
        first_test: first step in which the stop head and padding can end the row.
        motion_waits: before step `delay`, tokens have no motion part, instead of zero frames or those of the prefix.
        trim: speech is trimmed to the length of the motion, which is delayed by `delay` patches.
        padding_ends: a patch whose last frame is padding ends the row, as only the last patch of a training clip is
            padded, and padding is replaced with silence.
    """

    stop_hits: int = 1
    first_test: int = 1
    motion_waits: bool = False
    trim: bool = True
    padding_ends: bool = True


@dataclass(frozen=True)
class Request:
    """Inputs of one row of a batch.

    Attributes:
        prompt: text tokens before the placeholders.
        speaker: (G,) speaker embedding.
        speech: (F, Ds) latents of a given stream, or of the prefix of a generated stream.
        motion: (F, Dm) normalised motion of a given stream, or of the prefix of a generated stream.
        first_motion: (Dm,) normalised motion of the reference image. None if no motion is generated.
        prefix: number of patches of the prefix.
        max_patches: maximum number of patches after the prefix. Ignored if a given stream determines the length.
        min_patches: minimum number of patches after the prefix.
        seed: seed of the noise.
        task_first: True if the task embedding is the first token, as in training. Otherwise it is added to the first
            prefix patch, and omitted without a prefix (as in the official inference script).
        prefix_has_motion: whether the prefix patches contain motion, as in training (but not in
            `generate_speech_motion`).
        rules: stopping rules.
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
    task_first: bool = True
    prefix_has_motion: bool = True
    rules: StoppingRules = StoppingRules()
