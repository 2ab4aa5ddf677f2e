"""POSTER V2 (Mao et al. 2023, arXiv:2301.12149), which classifies a face into seven expressions.

Weights: `affectnet-7-model_best.pth` or `raf-db-model_best.pth`, linked in the README of Talented-Q/POSTER_V2. The code
is under MIT; the weights were trained on AffectNet or RAF-DB, which are for research only. Module names are those of
the checkpoints; unused modules are omitted.

Axes: n faces, C channels, H = W map side, N = H W positions, D token width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from engine.device import to_device
from engine.errors import UserError
from engine.official import rename_all
from engine.release import build_with
from engine.torch_files import read_state
from hicodit.conditions.types import EXPRESSIONS

SIDE = 224
BACKBONE_SIDE = 112
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
HEAD_WIDTH = 32  # width of a head of cross-attention
WIDTH = 768  # width of the transformer
HEADS = 8  # number of heads of the transformer
POSITIONS = "n c h w -> n (h w) c"

# Class order of each checkpoint.
CLASSES = {
    "affectnet": EXPRESSIONS,
    "raf": ("surprised", "fearful", "disgusted", "happy", "sad", "angry", "neutral"),
}
RULES = (  # renaming rules from the checkpoints; unused tensors are dropped
    (r"^module\.", ""),
    (r"^VIT\.(?:CON1\.|IRLinear|eca_block\.|patch_embed\.)|^(?:ir_back|face_landback)\.output_layer\.", None),
    (r"^VIT\.blocks\..*\.conv\.", None),
)


def _named(**layers: nn.Module) -> nn.Sequential:
    """Return a sequence of layers with the given names."""
    return nn.Sequential(OrderedDict(layers))


# --- the landmark network: MobileFaceNet (Chen et al. 2018, arXiv:1804.07573) without its embedding ---


def _convolution(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, linear: bool = False
) -> nn.Sequential:
    """Return a convolution without bias, batch norm and, unless `linear`, PReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return _named(conv=conv, bn=nn.BatchNorm2d(outputs), **({} if linear else {"prelu": nn.PReLU(outputs)}))


def _bottleneck(inputs: int, outputs: int, middle: int, stride: int = 1) -> nn.Sequential:
    """Return an inverted bottleneck: pointwise expansion, depthwise convolution, pointwise projection."""
    return _named(
        conv=_convolution(inputs, middle),
        conv_dw=_convolution(middle, middle, 3, stride, groups=middle),
        project=_convolution(middle, outputs, linear=True),
    )


class _Bottlenecks(nn.Module):
    """A stack of inverted bottlenecks with residual connections."""

    def __init__(self, width: int, middle: int, count: int):
        super().__init__()
        self.model = nn.ModuleList(_bottleneck(width, width, middle) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for bottleneck in self.model:
            x = x + bottleneck(x)
        return x


class LandmarkBackbone(nn.Module):
    """Maps images (n, 3, 112, 112) to feature maps (n, 64, 28, 28), (n, 128, 14, 14), (n, 512, 7, 7)."""

    def __init__(self):
        super().__init__()
        self.conv1 = _convolution(3, 64, 3, 2)
        self.conv2_dw = _convolution(64, 64, 3, groups=64)
        self.conv_23 = _bottleneck(64, 64, 128, 2)
        self.conv_3 = _Bottlenecks(64, 128, 4)
        self.conv_34 = _bottleneck(64, 128, 256, 2)
        self.conv_4 = _Bottlenecks(128, 256, 6)
        self.conv_45 = _bottleneck(128, 128, 512, 2)
        self.conv_5 = _Bottlenecks(128, 256, 2)
        self.conv_6_sep = _convolution(128, 512)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = self.conv_3(self.conv_23(self.conv2_dw(self.conv1(x))))
        second = self.conv_4(self.conv_34(first))
        return first, second, self.conv_6_sep(self.conv_5(self.conv_45(second)))


# --- the image network: the first three stages of IR-50 (Deng et al. 2019, arXiv:1801.07698) ---


class _IRBlock(nn.Module):
    """IR block: norm, convolution, PReLU, strided convolution, norm, plus the (strided) input, without activation after
    the sum.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        if inputs == outputs:
            self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        else:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut_layer = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False),
            nn.PReLU(outputs),
            nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut_layer(x) + self.res_layer(x)


class ImageBackbone(nn.Module):
    """Maps images (n, 3, 112, 112) to feature maps (n, 64, 56, 56), (n, 128, 28, 28), (n, 256, 14, 14)."""

    def __init__(self):
        super().__init__()
        self.input_layer = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        self.body1, self.body2, self.body3 = (
            nn.Sequential(_IRBlock(inputs, outputs, 2), *(_IRBlock(outputs, outputs, 1) for _ in range(count - 1)))
            for inputs, outputs, count in ((64, 64, 3), (64, 128, 4), (128, 256, 14))
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = self.body1(self.input_layer(x))
        second = self.body2(first)
        return first, second, self.body3(second)


# --- fusion of both networks ---


class CrossAttention(nn.Module):
    """Cross-attention with landmark features (n, N, C) as queries, without projection, and image features (n, N, C) as
    keys and values.

    The attention window is the whole map of `side` x `side` positions.
    """

    def __init__(self, width: int, side: int):
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.side = side
        self.qkv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * side - 1) ** 2, self.heads))

    def forward(self, image: Tensor, landmark: Tensor) -> Tensor:
        key, value = self.qkv(image).unflatten(-1, (2, self.heads, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        query = landmark.unflatten(-1, (self.heads, HEAD_WIDTH)).transpose(1, 2)
        line = torch.arange(self.side, device=image.device)
        offset = line[:, None] - line + self.side - 1  # along one axis; positions are in row-major order
        index = (2 * self.side - 1) * offset[:, None, :, None] + offset[:, None]  # (side, side, side, side)
        bias = self.relative_position_bias_table[index.flatten(2).flatten(0, 1)].permute(2, 0, 1)
        out = F.scaled_dot_product_attention(query, key, value, bias.expand(len(query), -1, -1, -1))
        return self.proj(out.transpose(1, 2).flatten(2))


def _mlp(width: int) -> nn.Sequential:
    return _named(fc1=nn.Linear(width, 4 * width), gelu=nn.GELU(), fc2=nn.Linear(4 * width, width))


class _GatedMLP(nn.Module):
    """Adds attention, then an MLP, each with a learned gain per channel: (n, N, C) -> (n, N, C)."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma1 = nn.Parameter(torch.full((width,), 1e-5))
        self.gamma2 = nn.Parameter(torch.full((width,), 1e-5))
        self.mlp = _mlp(width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, attention: Tensor) -> Tensor:
        x = x + self.gamma1 * attention
        return x + self.gamma2 * self.mlp(self.norm(x))


class _Block(nn.Module):
    """Pre-norm transformer block (n, N, D) -> (n, N, D)."""

    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(WIDTH, 3 * WIDTH), "proj": nn.Linear(WIDTH, WIDTH)})
        self.mlp = _mlp(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.attn["proj"](F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class TokenClassifier(nn.Module):
    """Maps tokens (n, 147, D) and a class token through two transformer blocks to logits (n, classes)."""

    def __init__(self, classes: int):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + 147, WIDTH))
        self.blocks = nn.Sequential(_Block(), _Block())
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        gate = {"linear1": nn.Linear(WIDTH, WIDTH), "relu": nn.ReLU(), "linear2": nn.Linear(WIDTH, WIDTH)}
        self.se_block = _named(**gate, sigmoid=nn.Sigmoid())
        self.head = _named(linear=nn.Linear(WIDTH, classes))

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1) + self.pos_embed
        summary = self.norm(self.blocks(x))[:, 0]
        return self.head(summary * self.se_block(summary))


class POSTER2(nn.Module):
    """Maps faces to expression logits over `EXPRESSIONS`.

    Args:
        classes: expressions in the order of the network outputs; see `CLASSES`.
    """

    def __init__(self, classes: tuple[str, ...] = EXPRESSIONS):
        super().__init__()
        self.classes = classes
        self.face_landback = LandmarkBackbone()
        self.ir_back = ImageBackbone()
        self.last_face_conv = nn.Conv2d(512, 256, 3, padding=1)
        self.conv1 = nn.Conv2d(64, 64, 3, 2, 1)
        self.conv2 = nn.Conv2d(128, 128, 3, 2, 1)
        self.conv3 = nn.Conv2d(256, 256, 3, 2, 1)
        self.window1 = _named(norm=nn.LayerNorm(64))
        self.window2 = _named(norm=nn.LayerNorm(128))
        self.window3 = _named(norm=nn.LayerNorm(256))
        self.attn1 = CrossAttention(64, 28)
        self.attn2 = CrossAttention(128, 14)
        self.attn3 = CrossAttention(256, 7)
        self.ffn1 = _GatedMLP(64)
        self.ffn2 = _GatedMLP(128)
        self.ffn3 = _GatedMLP(256)
        self.embed_q = nn.Sequential(nn.Conv2d(64, WIDTH, 3, 2, 1), nn.Conv2d(WIDTH, WIDTH, 3, 2, 1))
        self.embed_k = nn.Sequential(nn.Conv2d(128, WIDTH, 3, 2, 1))
        self.embed_v = _named(proj=nn.Conv2d(256, WIDTH, 1))
        self.VIT = TokenClassifier(len(classes))

    @staticmethod
    def shrink(x: Tensor) -> Tensor:
        """Reduce (n, 3, 224, 224) to (n, 3, 112, 112) for both backbones by taking every second pixel, as in the
        original.
        """
        return F.interpolate(x, size=(BACKBONE_SIDE, BACKBONE_SIDE))

    def fuse(self, x: Tensor) -> list[Tensor]:
        """Map normalised images (n, 3, 224, 224) to feature maps (n, 64, 28, 28), (n, 128, 14, 14), (n, 256, 7, 7)."""
        small = self.shrink(x)
        first, second, third = self.face_landback(small)
        landmarks = first, second, self.last_face_conv(third)
        maps = []
        for i, (landmark, image) in enumerate(zip(landmarks, self.ir_back(small)), 1):
            image = rearrange(getattr(self, f"conv{i}")(image), POSITIONS)
            image = getattr(self, f"window{i}")(image)
            attention = getattr(self, f"attn{i}")(image, rearrange(landmark, POSITIONS))
            positions = getattr(self, f"ffn{i}")(image, attention)
            maps.append(rearrange(positions, "n (h w) c -> n c h w", h=landmark.shape[-2]))
        return maps

    def tokens(self, maps: list[Tensor]) -> Tensor:
        """Map the three feature maps to tokens (n, 147, D)."""
        embedded = self.embed_q(maps[0]), self.embed_k(maps[1]), self.embed_v(maps[2])
        return torch.cat([rearrange(x, POSITIONS) for x in embedded], 1)

    def logits(self, x: Tensor) -> Tensor:
        """Map normalised images (n, 3, 224, 224) to logits (n, classes), in the network's own class order."""
        return self.VIT(self.tokens(self.fuse(x)))

    def normalise(self, faces: Tensor) -> Tensor:
        """Resize and normalise images (n, 3, H, W) RGB in [0, 1] to (n, 3, 224, 224)."""
        if faces.shape[-2:] != (SIDE, SIDE):
            faces = F.interpolate(faces, size=(SIDE, SIDE), mode="bilinear", antialias=True)
        mean, std = to_device(torch.tensor([MEAN, STD], dtype=faces.dtype), faces.device)[..., None, None]
        return (faces - mean) / std

    def forward(self, faces: Tensor) -> Tensor:
        """Map aligned face crops (n, 3, H, W) RGB in [0, 1] to logits (n, 7) over `EXPRESSIONS`.

        `hicodit.conditions.types.majority_expressions` reduces a sequence of logits to one class per half second.
        """
        order = to_device(torch.tensor([self.classes.index(name) for name in EXPRESSIONS]), faces.device)
        return self.logits(self.normalise(faces))[:, order]

    @classmethod
    def from_upstream(
        cls, state: Mapping[str, Tensor], classes: tuple[str, ...], source: str | Path = "POSTER V2"
    ) -> POSTER2:
        """Create the network from the state dict of a checkpoint. Loading is strict, except for unused tensors."""
        return build_with(lambda: cls(classes), rename_all(state, RULES), source)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> POSTER2:
        """Load a released checkpoint. Its name must contain "affectnet" or "raf", which determines the class order.

        Pickled meters of the training script are not restored: no code in the file is executed.
        """
        path = Path(path)
        orders = [classes for word, classes in CLASSES.items() if word in path.name.lower()]
        if len(orders) != 1:
            raise UserError(f"{path}: the name must contain 'affectnet' or 'raf', which determines the class order")
        return cls.from_upstream(read_state(path, "state_dict"), orders[0], path)
