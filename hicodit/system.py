"""HiCoDiT's score network together with its condition encoders, as trained, released and loaded.

Axes: F face crops, S' their side, J half seconds.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from engine.codec import Codec
from engine.device import to_device
from engine.errors import UserError
from engine.release import Pretrained
from hicodit.conditions import EncoderConfig, encoder_config, encoders_learn, make_encoders
from hicodit.conditions.encoders import to_unit_range
from hicodit.conditions.types import EXPRESSIONS, IDENTITY_DIM, majority_expressions
from hicodit.model import HiCoDiT, ModelConfig
from rvq_codec import RVQCodec

CODECS: dict[str, type[Codec]] = {RVQCodec.kind: RVQCodec}  # supported tokenizers
FACE_BATCH = 512  # face crops per batch of the expression encoder


def voice_face_frames(frames: int) -> list[int]:
    """Return the frames of the four faces from which the voice of a clip is predicted, a fifth of the clip apart."""
    return [frames * fifth // 5 for fifth in (1, 2, 3, 4)]


class HiCoDiTSystem(Pretrained):
    """Score network and the three condition encoders.

    Upstream encoders are not part of the state that is trained, saved and loaded.
    """

    kind = "hicodit"
    max_extra_tensors = 4000  # size of the upstream encoders
    max_extra_params = 2**29

    def __init__(self, model: ModelConfig, encoders: EncoderConfig) -> None:
        super().__init__(model)
        widths = {
            "lip_dim": encoders.lip_dim,
            "face_dim": encoders.face_dim,
            "identity_dim": IDENTITY_DIM,
            "expressions": len(EXPRESSIONS),
        }
        for name, width in widths.items():
            if getattr(model, name) != width:
                raise UserError(
                    f"model.{name}={getattr(model, name)}, but the encoders have {width}: set it to {width}"
                )
        self.model = HiCoDiT(model)
        self.encoders = make_encoders(encoders)

    def voice_face_indices(self, frames: int) -> list[int]:
        """Return the indices of the four face crops from which the voice of a clip is predicted, a fifth of the clip
        apart.
        """
        return [frame // self.encoders.config.picture_every for frame in voice_face_frames(frames)]

    def read_expressions(self, faces: Tensor) -> Tensor:
        """Predict class probabilities (F, classes) of face crops (F, 3, S', S') in [0, 1] or uint8, on any device."""
        device = next(self.parameters()).device
        # In batches, as all face crops of a long clip would take gigabytes on the device.
        parts = (to_device(part, device) for part in faces.split(FACE_BATCH))
        return torch.cat([self.encoders.expression(to_unit_range(part)).float().softmax(-1) for part in parts])

    def window_classes(self, probabilities: Tensor, frames: int) -> Tensor:
        """Reduce the results of `read_expressions` to half-second classes (J,) of a clip with `frames` frames."""
        return majority_expressions(probabilities.repeat_interleave(self.encoders.config.picture_every, 0)[:frames])

    def arguments(self) -> dict[str, Any]:
        return {"model": asdict(self.model.config), "encoders": asdict(self.encoders.config)}

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any], encoders: str | None = None) -> HiCoDiTSystem:
        """Create the system with random weights. Upstream encoders are loaded.

        Args:
            arguments: contents of config.yaml without the kind.
            encoders: folder with the checkpoints of the upstream encoders. None: the one used in training.
        """
        settings = dict(arguments["encoders"])
        if encoders is not None and encoders_learn(encoder_config(settings).kind):
            raise UserError(f"encoders={encoders}: this model includes its encoders, omit this setting")
        if encoders is not None:
            settings["folder"] = encoders
        return cls(ModelConfig(**arguments["model"]), encoder_config(settings))
