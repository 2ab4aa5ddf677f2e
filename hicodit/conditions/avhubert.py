"""AV-HuBERT's visual encoder (arXiv 2201.02184), which maps mouth crops to lip features, and its released checkpoint.

Axes: B batch, T video frames (25 per second), H = W image side, C channels, E model width.

Weights: https://github.com/facebookresearch/av_hubert, `large_vox_iter5.pt` (AV-HuBERT Large, pre-trained on LRS3 and
VoxCeleb2), under the "AV-HuBERT License" of Meta: non-commercial research only. They are not part of this project.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.device import to_device
from engine.errors import UserError
from engine.official import numbered, rename_all, sizes_of
from engine.release import build_with
from engine.settings import Group, setting
from engine.torch_files import plain, read_checkpoint

VIEW = 88  # side of the network input in pixels
# mean and standard deviation of grey values in [0, 1]
MEAN = 0.421
DEVIATION = 0.165


@dataclass(frozen=True)
class AVHubertConfig(Group, prefix="encoders.lip."):
    """Config of AV-HuBERT. The defaults are AV-HuBERT Large."""

    width: int = setting(1024, 1, 2**14)
    layers: int = setting(24, 0, 256)
    heads: int = setting(16, 1, 256)
    hidden: int = setting(4096, 1, 2**16)
    conv_kernel: int = setting(128, 1, 2**10)
    conv_groups: int = setting(16, 1, 2**10)
    norm_first: bool = True  # False: layer norms after the residual sums


def prepare_mouth(mouth: Tensor) -> Tensor:
    """Crop the centre (..., 88, 88) of mouth crops (..., H, W) in [0, 1] and normalise by the fixed mean and
    standard deviation.
    """
    height, width = mouth.shape[-2:]
    assert min(height, width) >= VIEW, mouth.shape
    top = (height - VIEW) // 2
    left = (width - VIEW) // 2
    return (mouth[..., top : top + VIEW, left : left + VIEW] - MEAN) / DEVIATION


class _Block(nn.Module):
    """ResNet basic block with PReLU: (n, C, H, W) -> (n, C', H / stride, W / stride)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu1 = nn.PReLU(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu2 = nn.PReLU(out)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(h + (x if self.downsample is None else self.downsample(x)))


class VideoFrontEnd(nn.Module):
    """3-D convolution over five frames, followed by a ResNet-18 per frame: (B, T, 88, 88) -> (B, T, 512)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(1, 64, (5, 7, 7), (1, 2, 2), (2, 3, 3), bias=False),
            nn.BatchNorm3d(64),
            nn.PReLU(64),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        )
        stages = []
        channels = 64
        for out, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            stages.append(nn.Sequential(_Block(channels, out, stride), _Block(out, out, 1)))
            channels = out
        self.stages = nn.Sequential(*stages)

    def forward(self, video: Tensor) -> Tensor:
        stem = self.stem(video[:, None]).transpose(1, 2)  # (B, T, 64, 22, 22)
        return self.stages(stem.flatten(0, 1)).mean((-1, -2)).unflatten(0, stem.shape[:2])


class _Layer(nn.Module):
    """Transformer layer (B, T, E) -> (B, T, E). `attend` (B, 1, 1, T) is True for keys to attend to."""

    def __init__(self, c: AVHubertConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.norm_first = c.norm_first
        self.q_proj = nn.Linear(c.width, c.width)
        self.k_proj = nn.Linear(c.width, c.width)
        self.v_proj = nn.Linear(c.width, c.width)
        self.out_proj = nn.Linear(c.width, c.width)
        self.attention_norm = nn.LayerNorm(c.width)
        self.final_norm = nn.LayerNorm(c.width)
        self.fc1 = nn.Linear(c.width, c.hidden)
        self.fc2 = nn.Linear(c.hidden, c.width)

    def attention(self, x: Tensor, attend: Tensor | None) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, attend).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, attend: Tensor | None) -> Tensor:
        if self.norm_first:
            x = x + self.attention(self.attention_norm(x), attend)
            return x + self.fc2(F.gelu(self.fc1(self.final_norm(x))))
        x = self.attention_norm(x + self.attention(x, attend))
        return self.final_norm(x + self.fc2(F.gelu(self.fc1(x))))


class AVHubert(nn.Module):
    """AV-HuBERT's visual encoder, which computes lip features from mouth crops of at least 88 x 88 pixels."""

    def __init__(self, config: AVHubertConfig) -> None:
        super().__init__()
        c = self.config = config
        self.front_end = VideoFrontEnd()
        self.video_proj = nn.Linear(512, c.width)
        self.fusion_norm = nn.LayerNorm(2 * c.width)
        self.fusion_proj = nn.Linear(2 * c.width, c.width)
        # The released kernel is stored as direction and gain; only their product is needed.
        self.position = nn.Conv1d(c.width, c.width, c.conv_kernel, padding=c.conv_kernel // 2, groups=c.conv_groups)
        self.layers = nn.ModuleList(_Layer(c) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.width)

    def forward(self, mouth: Tensor, frames: Tensor) -> Tensor:
        """Map mouth crops (B, T, H, W) in [0, 1] with frames (B,) valid frames to the last hidden states (B, T, E)."""
        valid = torch.arange(mouth.shape[1], device=frames.device) < frames[:, None]
        whole = bool(valid.all())
        valid = to_device(valid, mouth.device)  # on the host
        video = prepare_mouth(mouth) * valid[..., None, None]  # mask frames beyond the end of a clip
        return self.encode(self.fuse(self.video_proj(self.front_end(video))), None if whole else valid)

    def fuse(self, video: Tensor, audio: Tensor | None = None) -> Tensor:
        """Fuse projected video features with audio features, or with zeros: each (B, T, E) -> (B, T, E)."""
        audio = torch.zeros_like(video) if audio is None else audio
        return self.fusion_proj(self.fusion_norm(torch.cat([audio, video], -1)))

    def encode(self, x: Tensor, valid: Tensor | None = None, layer: int | None = None) -> Tensor:
        """Run the transformer on fused features (B, T, E).

        Args:
            valid: (B, T) bool, False for padded frames.
            layer: return the output of this layer (counted from 1), without the final layer norm.
        """
        attend = None
        if valid is not None:
            x = x * valid[..., None]
            attend = valid[:, None, None]
        position = self.position(x.transpose(1, 2)).transpose(1, 2)
        x = x + F.gelu(position[:, : x.shape[1]])  # an even kernel yields one frame too many
        if not self.config.norm_first:
            x = self.norm(x)
        for block in self.layers[:layer]:
            x = block(x, attend)
        return self.norm(x) if self.config.norm_first and layer is None else x

    @classmethod
    def from_pretrained(cls, path: str | Path) -> AVHubert:
        """Load the visual encoder from a released checkpoint, pre-trained or fine-tuned, in eval mode.

        No code named in the pickle is executed.
        """
        content = read_checkpoint(Path(path))
        state = content.get("model")
        if not isinstance(state, dict):
            raise UserError(f"{path} has no entry 'model': not an AV-HuBERT checkpoint")
        state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        return cls.from_upstream(state, path, content.get("cfg") or content.get("args"))

    @classmethod
    def from_upstream(cls, state: dict[str, Tensor], source: str | Path, settings: Any = None) -> AVHubert:
        """Create the network from the tensors of `state` (released names), strictly; see `released_config`."""
        ours = our_state(state)
        config = released_config(ours, settings)
        return build_with(lambda: cls(config), ours, source)


RULES = (  # renaming rules from the released file; tensors that the visual encoder does not need are dropped
    (r"^encoder\.w2v_model\.", ""),  # prefix of the encoder in fine-tuned checkpoints
    (r"^(?!feature_extractor_video\.|layer_norm\.|post_extract_proj\.|encoder\.)", None),
    (r"^feature_extractor_video\.proj\.", "video_proj."),
    (r"^feature_extractor_video\.resnet\.frontend3D\.", "front_end.stem."),
    (r"^feature_extractor_video\.resnet\.trunk\.layer(\d)", lambda found: f"front_end.stages.{int(found[1]) - 1}"),
    (r"^layer_norm\.", "fusion_norm."),
    (r"^post_extract_proj\.", "fusion_proj."),
    (r"^encoder\.pos_conv\.0\.", "position."),
    (r"^encoder\.layer_norm\.", "norm."),
    (r"^encoder\.layers\.", "layers."),
    (r"\.self_attn_layer_norm\.", ".attention_norm."),
    (r"\.final_layer_norm\.", ".final_norm."),
    (r"\.self_attn\.", "."),
)


def our_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the visual encoder under our names, with the weight norm of the position kernel merged."""
    out = rename_all(state, RULES)
    if "position.weight_v" in out and "position.weight_g" in out:
        direction = out.pop("position.weight_v").float()
        gain = out.pop("position.weight_g").float()
        out["position.weight"] = gain * direction / direction.norm(dim=(0, 1), keepdim=True)  # one gain per kernel tap
    return out


def released_config(state: dict[str, Tensor], settings: Any = None) -> AVHubertConfig:
    """Infer the config from tensor shapes (our names) and, for other fields, from the pickled `settings` or the
    published defaults.
    """
    with sizes_of("an AV-HuBERT checkpoint"):
        width, group, kernel = state["position.weight"].shape
        hidden = len(state["layers.0.fc1.weight"])
    published = _settings(settings)
    return AVHubertConfig(
        width=width,
        layers=len(numbered(state, "layers.{}.fc1.weight")),
        heads=published.get("encoder_attention_heads", width // 64),
        hidden=hidden,
        conv_kernel=kernel,
        conv_groups=width // group,
        norm_first=published.get("layer_norm_first", True),
    )


def _settings(node: Any) -> dict[str, Any]:
    """Return the model settings in a fairseq configuration: those of the pre-trained model if a fine-tuned one wraps
    it.
    """
    node = plain(node)
    if not isinstance(node, dict):
        return {}
    inner = node.get("model")
    if not isinstance(inner, dict):
        return node
    wrapped = inner.get("w2v_args")
    return _settings(wrapped) if isinstance(wrapped, dict) else inner
