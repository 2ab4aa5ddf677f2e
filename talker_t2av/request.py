"""What to generate: the four modes, the sampler's settings, the inputs of one row, and how a batch ends.

Axes: F frames, Ds / Dm speech / motion channels, G speaker embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from engine.settings import Group, setting

if TYPE_CHECKING:
    from torch import Tensor  # importing it takes seconds

TTS, T2AV = range(2)  # rows of the task embedding
Stream = Literal["speech", "motion"]
# Streams that take turns: the ablation of Table 4 (arXiv 2604.23586). With order=add, the paper's own, a patch of
# 160 ms is one token, the sum of both streams'. Else it is two, one of each stream, each predicted from the one before
# it: the second stream is drawn with the first one's patch of the same time known. A row of speech alone has one token.
ORDERS: dict[str, tuple[Stream, Stream]] = {"av": ("speech", "motion"), "va": ("motion", "speech")}


def tokens_per_patch(order: str, moving: bool) -> int:
    """Return the number of tokens of a patch: two where two streams take turns."""
    return 2 if order in ORDERS and moving else 1


@dataclass(frozen=True)
class Mode:
    """What happens to each stream."""

    speech: Literal["generated", "given"]
    motion: Literal["generated", "given", "absent"]

    @property
    def task(self) -> int:
        """Return the row of the task embedding. V2A and A2V have T2AV's: training reads both true streams, too."""
        return TTS if self.motion == "absent" else T2AV

    @property
    def open_ended(self) -> bool:
        """Whether the stop head sets the length, and no given stream."""
        return "given" not in (self.speech, self.motion)


MODES = {
    "t2av": Mode("generated", "generated"),
    "tts": Mode("generated", "absent"),
    "a2v": Mode("given", "generated"),
    "v2a": Mode("generated", "given"),
}


@dataclass(frozen=True)
class Sampling(Group, prefix="sampling."):
    """Settings of both diffusion heads; the defaults are those of the released command line."""

    steps: int = setting(10, 1, 1000, "steps of the flow solver (released model: 10)")
    temperature: float = setting(0.3, 0.0, 2.0, "scale of the initial noise (released model: 0.3)")
    guidance: float = setting(
        2.0, 0.0, 20.0, "scale of classifier-free guidance (released model: 2.0); 1: off, twice as fast"
    )
    unguided: int = setting(0, 0, 1000, "last solver steps without guidance, at half the cost")
    text_bytes: int = setting(
        190,  # a little less than 30 s of slow speech
        8,
        2000,
        "longer texts are spoken in parts (sentences, else clauses, else words) with short pauses between; above 190, "
        "a part may not fit into the 30 s that the model was trained on",
    )
    particles: int = setting(
        1, 1, 256, "v2a: drafts of the speech side by side, of which those that fit the face continue; 1: a single one"
    )
    particle_temperature: float = setting(0.8, 0.0, 2.0, "v2a: scale of the initial noise of several drafts")


@dataclass(frozen=True)
class LoopRules:
    """How a row ends. The defaults follow training; talker_t2av/official.py has those of the official routines.

    stop_hits: positive stop tests in a row that end a row; what was drawn between the first and the last is kept.
    first_test: the stop head is not asked before this step.
    motion_waits: before step `delay`, tokens have no motion part instead of that of zero frames or of the prefix.
    trim: speech is cut to the length of the motion, which lags behind it by `delay` patches.
    """

    stop_hits: int = 1
    first_test: int = 1
    motion_waits: bool = False
    trim: bool = True


@dataclass(frozen=True)
class Request:
    """What to generate in one row of a batch.

    Attributes:
        prompt: text tokens before the placeholders.
        speaker: (G,) speaker embedding.
        speech: (F, Ds) latents: all of a given stream, or the prefix of a generated one.
        motion: (F, Dm) likewise, normalised.
        first_motion: (Dm,) normalised motion of the reference picture; None where no motion is generated.
        prefix: patches of the prefix.
        max_patches: most patches after the prefix; a given stream sets its own length instead.
        min_patches: fewest patches after the prefix.
        seed: of the noise.
        task_first: the task embedding is the first token, as in training. If not, it is added to the first prefix
            patch, and left out where there is no prefix (the official inference script).
        prefix_has_motion: the prefix patches hold motion, as in training (not so in `generate_speech_motion`).
        rules: how the row ends.
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
    rules: LoopRules = LoopRules()
