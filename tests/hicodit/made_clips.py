"""Made-up clips for shards of HiCoDiT, as the tiny encoders take them."""

import torch
from torch import Tensor


def made_clip(frames: int, g: torch.Generator, **more: Tensor) -> dict[str, Tensor]:
    """Tensors of a clip of so many video frames, drawn from `g`; `more` replaces some and joins others."""
    return {
        "mouth": torch.randint(0, 255, (frames, 48, 48), generator=g).to(torch.uint8),
        "faces": torch.randint(0, 255, (4, 64, 64, 3), generator=g).to(torch.uint8),
        "ge2e": torch.nn.functional.normalize(torch.rand(256, generator=g), dim=-1),
        "expression": (torch.arange(-(-2 * frames // 25)) % 7).to(torch.uint8),
        "tokens": torch.randint(0, 16, (2 * frames, 12), generator=g).to(torch.int16),
    } | more
