"""A tiny release with random weights, and a drawn talking head, for everything that needs a whole pipeline."""

import cv2
import numpy as np
import pytest
import torch

from engine.media.video import write_video
from hicodit.conditions.encoders import TinyEncoderConfig
from hicodit.model import ModelConfig
from hicodit.system import HiCoDiTSystem
from rvq_codec import RVQCodec, RVQCodecConfig


@pytest.fixture(scope="session")
def release(tmp_path_factory):
    """Folder of a HiCoDiT release; its tokenizer lies beside it."""
    root = tmp_path_factory.mktemp("releases")
    torch.manual_seed(0)
    codec = RVQCodecConfig(
        encoder_width=4, ratios=(8, 5, 4, 3), latent_channels=16, codebook_size=16, codebook_dim=4, vocos_dim=16,
        vocos_intermediate=32, vocos_layers=1, n_fft=960,
    )  # fmt: skip
    RVQCodec(codec).save(root / "codec", "a test")
    model = ModelConfig(
        codes=16, width=32, heads=4, low_blocks=1, high_blocks=1, cond_dim=16, lip_dim=32, face_dim=16, dropout=0.0
    )
    system = HiCoDiTSystem(model, TinyEncoderConfig(lip_dim=32, lip_heads=4, face_dim=16, face_width=4))
    for parameter in system.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    system.save(root / "hicodit", "a test", {"codec": "codec", "sampler": {"method": "euler", "steps": 3}})
    return root / "hicodit"


def draw_face(opening: float, side: int = 128) -> np.ndarray:
    """A frontal face that OpenCV's cascade finds; `opening` of the mouth in [0, 1]."""
    s = side / 128
    image = np.full((side, side, 3), (150, 160, 170), np.uint8)

    def ellipse(x, y, a, b, colour):
        cv2.ellipse(image, (int(x * s), int(y * s)), (int(a * s), int(b * s)), 0, 0, 360, colour, -1, cv2.LINE_AA)

    ellipse(64, 66, 36, 46, (225, 185, 155))
    ellipse(64, 34, 36, 18, (70, 45, 30))
    for x in (49, 79):
        ellipse(x, 60, 8, 4, (250, 250, 250))
        ellipse(x, 60, 4, 4, (40, 30, 25))
        cv2.line(image, (int((x - 9) * s), int(51 * s)), (int((x + 9) * s), int(51 * s)), (70, 45, 30), int(3 * s))
    cv2.line(image, (int(64 * s), int(62 * s)), (int(62 * s), int(76 * s)), (175, 130, 105), int(3 * s))
    ellipse(64, 90, 14, 3 + 8 * opening, (150, 60, 60))
    return image


def talking_head(frames: int, side: int = 128) -> np.ndarray:
    return np.stack([draw_face(0.5 + 0.5 * np.sin(i), side) for i in range(frames)])


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A silent 1.6 s clip."""
    path = tmp_path_factory.mktemp("clips") / "head.mp4"
    write_video(path, talking_head(40), 25)
    return path
