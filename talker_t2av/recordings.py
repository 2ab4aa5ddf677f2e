"""Training straight from recordings in the layouts of the released data: lists of WAV and motion files.

Axes: N samples, F frames, Ds channels, G speaker embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import UserError
from talker_t2av.data import MotionStats, Paired, Row, TalkerFiles, read_csv, read_tts_list, read_txt
from talker_t2av.released import MOTION_MEAN, MOTION_STD
from talker_t2av.speaker.encoder import VoiceEncoder, WavLMEncoder
from whisperx_vae.codec import WhisperXVAE


class Encoders:
    """The speech codec and the speaker encoder, loaded when they are first used: in each process that loads data."""

    def __init__(self, codecs: Mapping[str, str]) -> None:
        self.codecs = dict(codecs)

    @cached_property
    def _speech(self) -> WhisperXVAE:
        return WhisperXVAE.from_pretrained(self.codecs["speech"])

    @cached_property
    def _speaker(self) -> WavLMEncoder | VoiceEncoder:
        folder = Path(self.codecs["speaker"])
        ours = (folder / "config.yaml").is_file()
        return (VoiceEncoder if ours else WavLMEncoder).from_pretrained(folder)

    def speech(self, wave24: Tensor, wave16: Tensor) -> Tensor:
        """(N,) at 24 kHz and at 16 kHz -> latents (F, Ds)."""
        return self._speech.encode_audio(wave24, wave16)

    @torch.no_grad()
    def speaker(self, wave16: Tensor) -> Tensor:
        """(N,) at 16 kHz -> (G,)."""
        return self._speaker.embed(wave16)


def recordings(
    codecs: Mapping[str, str],
    csv: str | None = None,
    root: str = ".",
    txt: str | None = None,
    video_dir: str | None = None,
    tts: str | None = None,
    stats: str | None = None,
    tokenizer: str | None = None,
    patch_size: int = 4,
    delay: int = 0,
) -> Paired:
    """Half T2AV and half TTS in each batch.

    Args:
        codecs: folders `speech` and `speaker`.
        csv, root: T2AV rows, whose relative paths stand under `root`. txt, video_dir: instead of them, a list of motion
            files and the folder of their sounds.
        tts: list of WAV files for TTS; None takes the T2AV rows without their motion.
        stats: of the motion; None: those of the released model.
        tokenizer, patch_size, delay: as in `TalkerShards`.

    Raises:
        UserError: not exactly one T2AV list is given, or one cannot be read.
    """
    if (csv is None) == (txt is None) or (txt is not None and video_dir is None):
        raise UserError("give the T2AV rows as data.train.csv, or as data.train.txt with data.train.video_dir")
    rows = read_csv(csv, root) if csv is not None else read_txt(txt, video_dir)
    without: list[Row] = read_tts_list(tts) if tts else [replace(row, motion=None) for row in rows]
    motion = MotionStats.read(stats) if stats else MotionStats(torch.tensor(MOTION_MEAN), torch.tensor(MOTION_STD))
    encoders = Encoders(codecs)
    more = (motion, encoders.speech, encoders.speaker, tokenizer, patch_size, delay)
    return Paired(TalkerFiles(rows, *more), TalkerFiles(without, *more))
