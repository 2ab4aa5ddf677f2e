"""A HiCoDiT model with its condition encoders: what is trained, released and loaded as one.

Axes: B batch, T video frames, J half seconds, F face pictures, S picture side, E lip feature width.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from engine.codec import Codec
from engine.errors import UserError
from engine.release import Released
from hicodit.conditions import EncoderConfig, encoder_config, make_encoders
from hicodit.conditions.types import EXPRESSIONS, Conditions, window_expressions
from hicodit.model import HiCoDiT, ModelConfig
from rvq_codec import RVQCodec

CODECS: dict[str, type[Codec]] = {RVQCodec.kind: RVQCodec}  # the tokenizers that can be chosen
PICTURES = 512  # face pictures whose expression is read at once


def _unit(pictures: Tensor) -> Tensor:
    """Bytes to [0, 1]; floats stay as they are."""
    return pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures


class HiCoDiTSystem(Released):
    """The score network and the three condition encoders.

    Released encoders are used, but they are not part of the state that is trained, saved and loaded.
    """

    kind = "hicodit"
    beyond = 4000, 2**29  # official encoders have so much

    def __init__(self, model: ModelConfig, encoders: EncoderConfig) -> None:
        super().__init__(model)
        if (model.lip_dim, model.face_dim) != (encoders.lip_dim, encoders.face_dim):
            raise UserError(
                f"the model wants lip and face features of width {model.lip_dim} and {model.face_dim}, "
                f"the encoders give {encoders.lip_dim} and {encoders.face_dim}"
            )
        if model.expressions != len(EXPRESSIONS):
            raise UserError(
                f"model.expressions={model.expressions}, but the expression encoders know {len(EXPRESSIONS)} classes "
                f"({', '.join(EXPRESSIONS)}): set it to {len(EXPRESSIONS)}"
            )
        self.model = HiCoDiT(model)
        self.encoders = make_encoders(encoders)
        if self.encoders.learns:
            self.encoders.lip.packed = model.packed

    def conditions(self, mouth: Tensor, faces: Tensor, frames: Tensor, identity: Tensor | None = None) -> Conditions:
        """The conditions of a batch of clips, from their pictures.

        Args:
            mouth: (B, T, S, S) grey. faces: (B, F, 3, S', S'), one every `picture_every` frames as the encoders'
                config says. Both in [0, 1], or uint8. frames: (B,) valid frames.
            identity: (B, 256) GE2E embeddings of reference voices in place of the faces'.
        """
        lip, every = self.encoders.lip(_unit(mouth), frames), self.encoders.config.picture_every
        if identity is None:
            picks = [(frames * share).long() // every for share in (0.2, 0.4, 0.6, 0.8)]
            chosen = [faces[range(len(faces)), pick] for pick in picks]
            identity = self.model.adapt_identity(self.encoders.identity(_unit(torch.stack(chosen, 1))))
        expression = []
        for clip, n in zip(faces, frames.tolist()):
            parts = clip[: -(-n // every)].split(PICTURES)  # of a long clip, all at once would take gigabytes
            shown = torch.cat([self.encoders.expression(_unit(part)) for part in parts]).float().softmax(-1)
            expression.append(window_expressions(shown.repeat_interleave(every, 0)[:n]))
        return Conditions(lip, identity, nn.utils.rnn.pad_sequence(expression, batch_first=True), frames)

    def conditions_of_features(self, lip: Tensor, faces: Tensor, expression: Tensor, frames: Tensor) -> Conditions:
        """The conditions of a batch of clips whose pictures encoders that do not learn have read before.

        Args:
            lip: (B, T, E). faces: (B, F, 512), each picture alone through the identity encoder.
            expression: (B, J) classes. frames: (B,) valid frames.
        """
        return Conditions(lip.float(), self.model.adapt_identity(faces.float().mean(1)), expression, frames)

    def arguments(self) -> dict[str, Any]:
        return {"model": asdict(self.model.config), "encoders": asdict(self.encoders.config)}

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any], encoders: str | None = None) -> HiCoDiTSystem:
        """As `Released` has it.

        Args:
            encoders: folder of the released encoders' checkpoints, where it is another than at training.

        Raises:
            UserError: `encoders` is given for a model with encoders of its own.
        """
        settings = dict(arguments["encoders"])
        if encoders is not None and settings.get("kind", "tiny") == "tiny":
            raise UserError(f"encoders={encoders}: this model has encoders of its own, leave this out")
        if encoders is not None:
            settings["folder"] = encoders
        return cls(ModelConfig(**arguments["model"]), encoder_config(settings))
