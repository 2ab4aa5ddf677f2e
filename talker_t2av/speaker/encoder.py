"""Speaker encoders, which map a voice to the embedding (256,) that conditions both diffusion heads.

`WavLMEncoder` is the released one, WavLM-Large (Chen et al. 2022, arXiv:2110.13900) with an ECAPA-TDNN head
(Desplanques et al. 2020, arXiv:2005.07143). Its weights are `wavlm_large_finetune.pth` of microsoft/UniSpeech,
downstreams/speaker_verification (repository licence CC BY-SA 3.0; WavLM itself is published in microsoft/unilm under
MIT). `VoiceEncoder` is the same head, small, on log-mel bands; its weights were trained in this project (Apache-2.0).

Axes: B batch, N samples at 16 kHz, T frames, K hidden states, C channels, M mel bands, D embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import WavLMConfig, WavLMModel

from engine.device import to_device
from engine.errors import UserError
from engine.media.audio import MIN_VOICE
from engine.nn.mel import RATE, log_mel
from engine.official import numbered, rename_all, sizes_of
from engine.release import Pretrained, build_with, weights_digest
from engine.settings import Group, setting
from engine.torch_files import read_state

SCALE = 8  # parts of a Res2 convolution
MIN_SAMPLES = int(MIN_VOICE * RATE)
FILE = "wavlm_large_finetune.pth"

# WavLM-Large as fields of `WavLMConfig`; the released file holds no configuration, but its tensors tell most sizes.
LARGE: dict[str, Any] = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
    "conv_dim": [512] * 7, "conv_kernel": [10, 3, 3, 3, 3, 2, 2], "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_bias": False, "feat_extract_norm": "layer", "do_stable_layer_norm": True, "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16, "num_buckets": 320, "max_bucket_distance": 800, "hidden_dropout": 0.0,
    "activation_dropout": 0.0, "attention_dropout": 0.0, "feat_proj_dropout": 0.0, "layerdrop": 0.0,
}  # fmt: skip
RULES = (  # names of the released file -> ours, which are those of transformers
    (r"^loss_calculator\.", None),
    (r"^(?!feature_extract\.model\.|feature_weight$)", "head."),
    (r"^feature_extract\.model\.", "wavlm."),
    (r"^wavlm\.mask_emb$", "wavlm.masked_spec_embed"),
    (r"^wavlm\.layer_norm\.", "wavlm.feature_projection.layer_norm."),
    (r"^wavlm\.post_extract_proj\.", "wavlm.feature_projection.projection."),
    (r"\.conv_layers\.(\d+)\.0\.", r".conv_layers.\1.conv."),
    (r"\.conv_layers\.(\d+)\.2\.(?:1\.)?", r".conv_layers.\1.layer_norm."),
    (r"\.pos_conv\.0\.", ".pos_conv_embed.conv."),
    (r"\.weight_g$", ".parametrizations.weight.original0"),
    (r"\.weight_v$", ".parametrizations.weight.original1"),
    (r"\.self_attn\.grep_linear\.", ".attention.gru_rel_pos_linear."),
    (r"\.self_attn\.grep_a$", ".attention.gru_rel_pos_const"),
    (r"\.self_attn\.relative_attention_bias\.", ".attention.rel_attn_embed."),
    (r"\.self_attn_layer_norm\.", ".layer_norm."),
    (r"\.self_attn\.", ".attention."),
    (r"\.fc1\.", ".feed_forward.intermediate_dense."),
    (r"\.fc2\.", ".feed_forward.output_dense."),
)


class ConvReluNorm(nn.Module):
    """Convolution, ReLU, batch norm, in this order: (B, C, T) -> (B, C', T)."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1):
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2)
        self.bn = nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(F.relu(self.conv(x)))


class Res2Conv(nn.Module):
    """Splits the channels into eight groups. Each group except for the last is convolved together with the result of
    the previous one.
    """

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        width = channels // SCALE
        self.convs = nn.ModuleList(
            nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation) for _ in range(SCALE - 1)
        )
        self.bns = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(SCALE - 1))

    def forward(self, x: Tensor) -> Tensor:
        *parts, last = x.chunk(SCALE, 1)
        results: list[Tensor] = []
        for part, conv, norm in zip(parts, self.convs, self.bns):
            total = part + results[-1] if results else part
            results.append(norm(F.relu(conv(total))))
        return torch.cat([*results, last], 1)


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate in (0, 1), which is computed from the means of all channels over time."""

    def __init__(self, channels: int, bottleneck: int):
        super().__init__()
        self.linear1 = nn.Linear(channels, bottleneck)
        self.linear2 = nn.Linear(bottleneck, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.linear2(F.relu(self.linear1(x.mean(-1)))).sigmoid()[..., None]


class SERes2Block(nn.Module):
    """Pointwise, Res2 and pointwise convolutions, squeeze-excite, and a residual connection: (B, C, T) -> (B, C, T)."""

    def __init__(self, channels: int, dilation: int, bottleneck: int):
        super().__init__()
        self.Conv1dReluBn1 = ConvReluNorm(channels, channels)
        self.Res2Conv1dReluBn = Res2Conv(channels, dilation)
        self.Conv1dReluBn2 = ConvReluNorm(channels, channels)
        self.SE_Connect = SqueezeExcite(channels, bottleneck)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.SE_Connect(self.Conv1dReluBn2(self.Res2Conv1dReluBn(self.Conv1dReluBn1(x))))


class AttentiveStatistics(nn.Module):
    """Mean and standard deviation over time, weighted by per-channel attention: (B, C, T) -> (B, 2 C)."""

    def __init__(self, channels: int, bottleneck: int):
        super().__init__()
        self.linear1 = nn.Conv1d(channels, bottleneck, 1)
        self.linear2 = nn.Conv1d(bottleneck, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.linear2(self.linear1(x).tanh()).softmax(-1)
        mean = (weight * x).sum(-1)
        variance = (weight * x.square()).sum(-1) - mean.square()
        return torch.cat([mean, variance.clamp_min(1e-9).sqrt()], 1)


class EcapaTDNN(nn.Module):
    """Maps frame features (B, C, T) to embeddings (B, D), not normalised. Tensor names are those of the release.

    Args:
        inputs: C, channels of the features.
        channels: channels of the three blocks; a multiple of 8.
        pooled: channels of the attentive statistics.
        bottleneck: channels of the squeeze-excitation and attention bottlenecks.
        embedding: D.
    """

    def __init__(
        self, inputs: int, channels: int = 512, pooled: int = 1536, bottleneck: int = 128, embedding: int = 256
    ):
        super().__init__()
        if channels % SCALE:
            raise UserError(f"ECAPA-TDNN with {channels} channels: expected a multiple of {SCALE}")
        self.layer1 = ConvReluNorm(inputs, channels, 5)
        self.layer2 = SERes2Block(channels, 2, bottleneck)
        self.layer3 = SERes2Block(channels, 3, bottleneck)
        self.layer4 = SERes2Block(channels, 4, bottleneck)
        self.conv = nn.Conv1d(3 * channels, pooled, 1)
        self.pooling = AttentiveStatistics(pooled, bottleneck)
        self.bn = nn.BatchNorm1d(2 * pooled)
        self.linear = nn.Linear(2 * pooled, embedding)

    def forward(self, features: Tensor) -> Tensor:
        first = self.layer1(features)
        second = self.layer2(first)
        third = self.layer3(second)
        fourth = self.layer4(third)
        pooled = self.pooling(F.relu(self.conv(torch.cat([second, third, fourth], 1))))
        return self.linear(self.bn(pooled))


def mix_states(states: Tensor, weight: Tensor) -> Tensor:
    """Average hidden states (K, B, T, C), weighted by the softmax of the logits `weight` (K,) -> (B, C, T)."""
    return torch.einsum("k,kbtc->bct", weight.softmax(0), states)


def standardise(features: Tensor) -> Tensor:
    """Scale (B, C, T) to zero mean and unit variance over time in every channel, the input of WavLM's head."""
    return F.instance_norm(features + 1e-6)


class WavLMEncoder(nn.Module):
    """Maps waveforms to speaker embeddings: mixed hidden states of WavLM, followed by ECAPA-TDNN.

    Args:
        config: configuration of WavLM.
        normalize: normalise each waveform to zero mean and unit variance (as for WavLM-Large).
        head: arguments of `EcapaTDNN` besides `inputs`.
    """

    def __init__(self, config: WavLMConfig, normalize: bool = True, **head: int):
        super().__init__()
        self.normalize = normalize
        self.wavlm = WavLMModel(config)
        self.feature_weight = nn.Parameter(torch.zeros(config.num_hidden_layers + 1))
        self.head = EcapaTDNN(config.hidden_size, **head)

    def digest(self) -> str:
        """Return the first eight hex digits of the SHA-256 of all weights."""
        return weights_digest(self)

    def normalise(self, wave: Tensor) -> Tensor:
        """Scale (..., N) to zero mean and unit variance over N, if the model was trained on such waveforms."""
        return F.layer_norm(wave, wave.shape[-1:]) if self.normalize else wave

    def hidden_states(self, waves: Sequence[Tensor]) -> Tensor:
        """Map waves (N_i,) of any lengths to (K, B, T, C): each layer's input, then the normalised output.

        Shorter waves are padded with zeros after their normalisation, and their padded frames are masked; the rows of
        masked frames are undefined.
        """
        lengths = [len(wave) for wave in waves]
        batch = nn.utils.rnn.pad_sequence([self.normalise(wave) for wave in waves], batch_first=True)
        frames = int(self.wavlm._get_feat_extract_output_lengths(torch.tensor(batch.shape[1])))
        mask = None
        if min(lengths) < batch.shape[1]:
            # The original cuts the batch into as many equal blocks as there are frames; a frame is padding if its
            # whole block is. WavLMModel counts frames from samples: the mask has just enough samples for the frames.
            block = batch.shape[1] // frames
            valid = [min(frames, -(-length // block)) for length in lengths]
            needed = to_device(torch.tensor([self._samples_of(count) for count in valid]), batch.device)
            mask = torch.arange(batch.shape[1], device=batch.device) < needed[:, None]
        out = self.wavlm(batch, attention_mask=mask, output_hidden_states=True)
        # The last of `hidden_states` is normalised in transformers 4 but not in 5; `last_hidden_state` is in both.
        return torch.stack([*out.hidden_states[:-1], out.last_hidden_state])

    def _samples_of(self, frames: int) -> int:
        """Return the minimum number of samples that yield `frames` frames."""
        config = self.wavlm.config
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride)):
            frames = (frames - 1) * stride + kernel
        return frames

    def forward(self, waves: Tensor) -> Tensor:
        """Map waves (B, N) at 16 kHz without padding -> (B, D)."""
        states = self.hidden_states(list(waves))
        return self.head(standardise(mix_states(states, self.feature_weight)))

    @torch.no_grad()
    def embed(self, wave: Tensor) -> Tensor:
        """Map a waveform (N,) at 16 kHz to an embedding (256,), not normalised."""
        return self(_checked(wave)[None])[0]

    @classmethod
    def from_upstream(
        cls,
        state: Mapping[str, Tensor],
        settings: Mapping[str, Any] | None = None,
        normalize: bool = True,
        source: str | Path = FILE,
    ) -> WavLMEncoder:
        """Create the encoder and load `state` strictly, except for the tensors of the training loss, which are ignored.

        Args:
            state: tensors by upstream name.
            settings: fields of `WavLMConfig`; None: those of `LARGE`, unless shapes imply others.
            normalize: normalise each waveform to zero mean and unit variance.
            source: origin of the state, for error messages.

        Raises:
            UserError: If tensors are missing, unexpected or of the wrong shape.
        """
        state = rename_all(state, RULES)
        config = WavLMConfig(**(LARGE | wavlm_sizes(state) if settings is None else settings))
        sizes = head_sizes(state)
        width = config.hidden_size
        projection = "wavlm.feature_projection.projection."  # the original has none where the widths agree
        state.setdefault(projection + "weight", torch.eye(width))
        state.setdefault(projection + "bias", torch.zeros(width))
        return build_with(lambda: cls(config, normalize, **sizes), state, source)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> WavLMEncoder:
        """Load the released `wavlm_large_finetune.pth`, or a folder that contains it. Nothing in the file is
        executed.
        """
        path = Path(path) / FILE if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise UserError(
                f"{path} not found: download it with python scripts/download_checkpoints.py talker_t2av --to DIR"
            )
        return cls.from_upstream(read_state(path, "model"), source=path)


def wavlm_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the fields of `LARGE` that follow from the shapes of a released state (our names)."""
    layer = "wavlm.encoder.layers.{}."
    with sizes_of("a WavLM-ECAPA speaker encoder"):
        position = state["wavlm.encoder.pos_conv_embed.conv.parametrizations.weight.original1"]
        width, group, kernel = position.shape
        buckets, heads = state[layer.format(0) + "attention.rel_attn_embed.weight"].shape
        first = [state[f"wavlm.feature_extractor.conv_layers.{i}.conv.weight"].shape for i in range(7)]
        hidden = numbered(state, layer + "feed_forward.intermediate_dense.weight")
        return {
            "hidden_size": width,
            "num_hidden_layers": len(hidden),
            "num_attention_heads": heads,
            "intermediate_size": len(hidden[0]),
            "conv_dim": [channels for channels, *_ in first],
            "conv_kernel": [size for *_, size in first],
            "num_conv_pos_embeddings": kernel,
            "num_conv_pos_embedding_groups": width // max(1, group),
            "num_buckets": buckets,
        }


def head_sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Return arguments of `EcapaTDNN` besides `inputs`, from the shapes of a released state (our names)."""
    names = {"channels": "layer1.conv", "pooled": "conv", "bottleneck": "pooling.linear1", "embedding": "linear"}
    with sizes_of("a WavLM-ECAPA speaker encoder"):
        return {size: len(state[f"head.{layer}.weight"]) for size, layer in names.items()}


@dataclass(frozen=True)
class VoiceEncoderConfig(Group):
    """Sizes of a `VoiceEncoder`; the head's are explained at `EcapaTDNN`."""

    bands: int = setting(80, 1, 2**10)
    channels: int = setting(96, 1, 2**14)
    pooled: int = setting(256, 1, 2**14)
    bottleneck: int = setting(48, 1, 2**14)
    embedding: int = setting(256, 1, 2**14)


def level_mel(wave: Tensor, bands: int) -> Tensor:
    """Return the log-mel spectrogram (..., M, T) of a waveform (..., N) at 16 kHz, independent of its loudness."""
    mel = log_mel(wave, bands)
    return mel - mel.amax((-2, -1), keepdim=True) + 1


class VoiceEncoder(Pretrained):
    """Small speaker encoder of waveforms: ECAPA-TDNN on log-mel bands."""

    kind = "voice_encoder"
    Config = VoiceEncoderConfig

    def __init__(self, config: VoiceEncoderConfig):
        super().__init__(config)
        self.head = EcapaTDNN(config.bands, config.channels, config.pooled, config.bottleneck, config.embedding)

    def forward(self, mel: Tensor) -> Tensor:
        """Map a `level_mel` (B, M, T), 100 frames per second, -> (B, D)."""
        return self.head(mel)

    @torch.no_grad()
    def embed(self, wave: Tensor) -> Tensor:
        """Map a waveform (N,) at 16 kHz to an embedding (256,), not normalised."""
        return self(level_mel(_checked(wave)[None], self.config.bands))[0]


def _checked(wave: Tensor) -> Tensor:
    if not isinstance(wave, Tensor):
        raise UserError(f"reference voice of type {type(wave).__name__}: expected a tensor of samples at 16 kHz")
    if wave.ndim != 1 or len(wave) < MIN_SAMPLES:
        raise UserError(
            f"reference voice of shape {tuple(wave.shape)}: expected one channel of at least {MIN_SAMPLES} samples"
        )
    return wave
