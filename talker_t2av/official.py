"""The three generation routines of the released program, as far as they differ from training.

| | `generate_speech` | `generate_speech_motion` | `inference_script` |
|---|---|---|---|
| jobs | tts with compat=official or library | t2av with compat=library | t2av with compat=official |
| frames of the prefix | rounded (half to even) | rounded, cut to whole patches | truncated, cut to whole patches |
| tokens of the prefix | speech | speech, without any motion part | speech and motion, `delay` more patches of speech |
| task embedding | first token | first token | added to the first prefix token, if there is one |
| voice is taken from | prefix, else 30 s padded with silence | the same | the whole reference |
| patches after the prefix, at most | reference - prefix + 25 | reference - prefix + 15 | reference - prefix + 15 |
| first stop test | step 25 // patch size | step 7 | step 7 |

All routines end a row after three consecutive positive stop predictions and prepend the prefix to the result. Two
peculiarities for models with a delay are reproduced: motion is delayed by `delay` steps after a prefix that already
includes the delay, and speech is longer than motion.

Axes: F frames, Ds / Dm speech / motion channels, G speaker embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from talker_t2av.model import FPS, MAX_FRAMES, TalkerConfig
from talker_t2av.request import Request, StoppingRules
from talker_t2av.system import MotionStats

STOP_HITS = 3  # consecutive positive stop predictions that end a row
SPEECH_RULES = StoppingRules(STOP_HITS, padding_ends=False)
MOTION_RULES = replace(SPEECH_RULES, first_test=7, motion_waits=True, trim=False)  # of both routines with motion
SPEECH_FIRST_TEST = 25  # frames before the first stop test of `generate_speech`
# Patches by which the result may exceed the reference.
EXTRA_SPEECH_PATCHES = 25
EXTRA_MOTION_PATCHES = 15


def prefix_frames(seconds: float, reference: int, size: int = 1) -> int:
    """Return the number of prefix frames that a method encodes, for a reference of `reference` frames.

    Args:
        size: `generate_speech_motion` truncates the prefix to whole patches of this size.
    """
    return min(round(seconds * FPS), reference) // size * size


def voice_frames(prefix: int) -> int:
    """Return the length in frames of the audio that both methods pass to the speaker encoder: `prefix`, or the maximum
    if `prefix` is 0. Shorter audio is zero-padded.
    """
    return prefix or MAX_FRAMES


def library_method(
    config: TalkerConfig,
    prompt: Sequence[int],
    speaker: Tensor,
    speech: Tensor,
    reference: int,
    first_motion: Tensor | None = None,
) -> Request:
    """Create the request of `generate_speech` or, with `first_motion`, of `generate_speech_motion`.

    Args:
        speaker: (G,), see `voice_frames`.
        speech: (F, Ds) latents of the prefix alone, see `prefix_frames`.
        reference: number of frames of the whole reference.
        first_motion: (Dm,) normalised.
    """
    size = config.patch_size
    has_motion = first_motion is not None
    prefix = -(-len(speech) // size)
    extra = EXTRA_MOTION_PATCHES - config.delay if has_motion else EXTRA_SPEECH_PATCHES
    return Request(
        prompt,
        speaker,
        speech,
        speech.new_zeros(0, config.motion_dim),
        first_motion,
        prefix,
        max_patches=-(-reference // size) - prefix + extra,
        prefix_has_motion=not has_motion,
        rules=MOTION_RULES if has_motion else replace(SPEECH_RULES, first_test=SPEECH_FIRST_TEST // size),
    )


def inference_script(
    config: TalkerConfig,
    stats: MotionStats,
    prompt: Sequence[int],
    speaker: Tensor,
    speech: Tensor,
    motion: Tensor,
    prefix_seconds: float,
) -> Request:
    """Create the request of the released command line, which continues a reference.

    Args:
        stats: mean and standard deviation of the motion channels.
        speech: (F, Ds) latents of the whole reference.
        motion: (F', Dm) of the whole reference, not normalised.
        prefix_seconds: seconds of the reference with which the result begins.
    """
    size = config.patch_size
    delay = config.delay
    frames = min(int(prefix_seconds * FPS), len(motion)) // size * size
    prefix = frames // size + delay
    reference = max(-(-len(speech) // size), len(motion) // size + delay)
    normalised = stats.normalise(motion).bfloat16().float()
    return Request(
        prompt,
        speaker,
        speech[: prefix * size],
        normalised[:frames],
        normalised[0],
        prefix,
        max_patches=reference - prefix + EXTRA_MOTION_PATCHES - delay,
        task_first=False,
        rules=MOTION_RULES,
    )
