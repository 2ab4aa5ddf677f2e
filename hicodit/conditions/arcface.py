"""ArcFace's iresnet (arXiv 1801.07698), which maps aligned faces to identity embeddings, and its released weights.

Axes: B batch, F face crops of a clip, n images, C channels, H = W image side, E = 512 embedding.

Weights: https://github.com/deepinsight/insightface, `arcface_torch` (a `backbone.pth` per network and training set).
The code is under MIT; the weights are for non-commercial research only and not part of this project.
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import UserError
from engine.official import numbered, rename_all
from engine.release import build_with
from engine.torch_files import read_state
from hicodit.conditions.align import ARCFACE_SIDE

IRESNET100 = (3, 13, 30, 3)  # number of residual blocks per stage
WIDTHS = (64, 128, 256, 512)


class _Block(nn.Module):
    """Residual block without activation after the sum: (n, C, H, W) -> (n, C', H / stride, W / stride)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.prelu = nn.PReLU(out)
        self.conv2 = nn.Conv2d(out, out, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        return h + (x if self.downsample is None else self.downsample(x))


class ArcFace(nn.Module):
    """Computes identity embeddings of faces aligned as for ArcFace. Parameter names are those of the released
    checkpoints.

    Args:
        blocks: number of residual blocks in each of the four stages.
    """

    def __init__(self, blocks: tuple[int, ...] = IRESNET100) -> None:
        super().__init__()
        self.blocks = tuple(blocks)
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.prelu = nn.PReLU(WIDTHS[0])
        channels = WIDTHS[0]
        for number, (width, count) in enumerate(zip(WIDTHS, self.blocks), 1):
            stage = [_Block(channels if i == 0 else width, width, 2 if i == 0 else 1) for i in range(count)]
            self.add_module(f"layer{number}", nn.Sequential(*stage))
            channels = width
        side = ARCFACE_SIDE // 16
        self.bn2 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels * side * side, 512)
        self.features = nn.BatchNorm1d(512)

    def maps(self, pictures: Tensor) -> list[Tensor]:
        """Return the output of each stage for images (n, 3, 112, 112) RGB in [-1, 1]."""
        x = self.prelu(self.bn1(self.conv1(pictures)))
        out = []
        for number in range(1, 5):
            x = getattr(self, f"layer{number}")(x)
            out.append(x)
        return out

    def embed(self, pictures: Tensor) -> Tensor:
        """Map images (n, 3, 112, 112) RGB in [-1, 1] to embeddings (n, 512), not normalised."""
        return self.features(self.fc(self.bn2(self.maps(pictures)[-1]).flatten(1)))

    def forward(self, faces: Tensor) -> Tensor:
        """Map faces (B, F, 3, H, H) RGB in [0, 1], where H is a multiple of 112, to embeddings (B, 512).

        The result is the mean of the unit vectors of the images, times sqrt(512), so that values for the adapter are of
        order one. The number of images is not stated in the HiCoDiT paper.
        """
        each = F.normalize(self.embed(prepare_faces(faces.flatten(0, 1))), dim=-1).unflatten(0, faces.shape[:2])
        return each.mean(1) * each.shape[-1] ** 0.5

    @classmethod
    def from_pretrained(cls, path: str | Path) -> ArcFace:
        """Load an `arcface_torch` file in eval mode. The depth is inferred from the parameter names."""
        return cls.from_upstream(read_state(path), path)

    @classmethod
    def from_upstream(cls, state: dict[str, Tensor], source: str | Path) -> ArcFace:
        """Create the network from the tensors of `state`, strictly, in eval mode."""
        state = rename_all(state, ((r"^module\.", ""),))
        blocks = tuple(len(numbered(state, f"layer{stage}.{{}}.bn1.weight")) for stage in range(1, 5))
        if not all(blocks):
            raise UserError(f"{source} is not an ArcFace network: it has no tensors layer1.0.* to layer4.0.*")
        return build_with(lambda: cls(blocks), state, source)


def prepare_faces(faces: Tensor) -> Tensor:
    """Convert faces (n, 3, H, H) in [0, 1] to (n, 3, 112, 112) in [-1, 1]. Larger images are reduced by averaging."""
    factor, rest = divmod(faces.shape[-1], ARCFACE_SIDE)
    assert factor and not rest and faces.shape[-1] == faces.shape[-2], faces.shape
    return 2 * (F.avg_pool2d(faces, factor) if factor > 1 else faces) - 1
