"""Talker-T2AV: a Qwen3 backbone between patch encoders and diffusion heads. Parameter names are those of the released
checkpoint.

Axes: B batch, T tokens, S tokens that they attend to, M patches, P frames of a patch, Ds / Dm speech / motion channels,
D width; of the cache: L layers, H key heads, N tokens, h head width.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from engine.errors import UserError
from engine.precision import convert_matrices
from engine.release import Pretrained, load_strict
from engine.settings import Group, require_range, setting
from talker_t2av import upstream
from talker_t2av.diffusion_head import DiffusionHead, FlowHead
from talker_t2av.flow_matching import DROP_COND, DROP_MU
from talker_t2av.layers import PatchEncoder, QwenNorm
from talker_t2av.request import ORDERS

LLM_FIELDS = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "tie_word_embeddings", "rope_theta", "attention_bias", "attention_dropout", "pad_token_id", "bos_token_id",
    "eos_token_id",
}  # fmt: skip
LLM_SIZES = {
    "vocab_size": 2**20, "hidden_size": 2**14, "intermediate_size": 2**16, "num_hidden_layers": 256,
    "num_attention_heads": 256, "num_key_value_heads": 256, "head_dim": 2**12, "max_position_embeddings": 2**20,
}  # fmt: skip
FLOAT32_MODULES = ("time_mlp", "delta_time_mlp", "head_stop")  # parts that stay in float32 at any precision
FPS = 25  # latent frames per second, speech and motion
# samples per second of the speech codec, and of Whisper and the speaker encoders
RATE = 24_000
RATE16 = 16_000
HOP = RATE // FPS
HOP16 = RATE16 // FPS
MAX_FRAMES = 30 * FPS  # window of the speech encoder
STOP_WEIGHT = 0.3  # of the released program; see `TalkerConfig.stop_weight`


@dataclass(frozen=True)
class TalkerConfig(Group, prefix="model."):
    """Config of `TalkerT2AV`. The defaults are those of the released model.

    Attributes:
        llm: fields of `transformers.Qwen3Config`; its hidden size is the width of every part.
        patch_size: frames per token.
        delay: delay of motion relative to speech in patches.
        context: number of previous patches that condition a diffusion head.
        order: tokens of a patch: add (one token, the sum of both streams), av or va (one token per stream; see
            `talker_t2av.request.ORDERS`).
        repeats: number of times that each example is used in a training step.
        motion_weight: weight of the motion loss.
        stop_weight: weight of positive labels of the stop loss, relative to the ratio of continue to stop labels: 0.3
            in the released program, 1 in the paper.
        drop_mu, drop_cond: probabilities of dropping the hidden state and the context patches when training the
            diffusion heads.
        phonemes: number of classes, including silence, of an auxiliary loss that predicts the phoneme of each frame
            from the state before its patch. It speeds up the training of a small model. 0: no such loss.
    """

    llm: dict[str, Any]
    patch_size: int = setting(4, 1, 256)
    delay: int = setting(0, 0, 256)
    context: int = setting(1, 0, 256)
    speech_dim: int = setting(32, 1, 2**16)
    motion_dim: int = setting(40, 1, 2**16)
    speaker_dim: int = setting(256, 1, 2**16)
    encoder_layers: int = setting(4, 1, 256)
    encoder_heads: int = setting(8, 1, 256)
    head_layers: int = setting(8, 1, 256)
    head_heads: int = setting(8, 1, 256)
    max_positions: int = setting(1024, 1, 2**20)
    repeats: int = setting(2, 1, 256)
    motion_weight: float = setting(10.0, 0.0, 1e6)
    stop_weight: float = setting(STOP_WEIGHT, 0.0, 100.0)
    drop_mu: float = setting(DROP_MU, 0.0, 1.0)
    drop_cond: float = setting(DROP_COND, 0.0, 1.0)
    order: str = "add"
    phonemes: int = setting(0, 0, 255)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ("add", *ORDERS):
            raise UserError(f"model.order={self.order} is unknown; choose add, {', '.join(ORDERS)}")
        if self.order in ORDERS and self.delay:
            raise UserError(f"model.order={self.order} needs model.delay=0")
        head_tokens = 2 + (self.context + 1) * self.patch_size
        if head_tokens > self.max_positions:
            raise UserError(
                f"model.max_positions={self.max_positions} must be at least {head_tokens}, the tokens of a diffusion "
                f"head with model.context={self.context} and model.patch_size={self.patch_size}"
            )
        # With other fields, such as attn_implementation, transformers would load code from the hub.
        wrong = self.llm.keys() - LLM_FIELDS if isinstance(self.llm, dict) else {"llm"}
        if wrong:
            raise UserError(f"model.llm.{min(wrong)} is not one of {', '.join(sorted(LLM_FIELDS))}")
        for name, most in LLM_SIZES.items():
            require_range(f"model.llm.{name}", self.llm.get(name, 1), 1, most)


class StopPredictor(nn.Module):
    """Stop head: hidden states (..., D) to logits (...)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width)
        self.head = nn.Linear(width, 1, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.head(F.silu(self.proj(h)))[..., 0]


class TalkerT2AV(Pretrained):
    """Language model over text and patches of speech and motion, with diffusion heads that generate the next
    patches.
    """

    kind = "talker_t2av"

    def __init__(self, config: TalkerConfig) -> None:
        super().__init__(config)
        c = config
        llm = Qwen3Config(**{"rope_theta": 1e6, "tie_word_embeddings": True, "use_cache": False, **c.llm})
        self.width = width = llm.hidden_size
        for name, heads in (("encoder_heads", c.encoder_heads), ("head_heads", c.head_heads)):
            if heads < 1 or width % (2 * heads):
                raise UserError(f"model.{name}={heads}: llm.hidden_size={width} must be a multiple of twice that")
        self.llm = Qwen3ForCausalLM(llm)
        for module in list(self.llm.modules()):
            for name, norm in list(module.named_children()):
                if isinstance(norm, Qwen3RMSNorm):
                    setattr(module, name, QwenNorm(len(norm.weight), norm.variance_epsilon))
        # For training from scratch, scale word embeddings like the other tokens, instead of Qwen's 0.02.
        nn.init.normal_(self.llm.model.embed_tokens.weight)
        self.projector_speech = nn.Sequential(OrderedDict(linear1=nn.Linear(c.speech_dim, width)))
        self.projector_motion = nn.Sequential(OrderedDict(linear1=nn.Linear(c.motion_dim, width)))
        encoder = (width, width, c.encoder_layers, c.encoder_heads, c.max_positions)
        self.speech_patch_encoder = PatchEncoder(*encoder)
        self.motion_patch_encoder = PatchEncoder(*encoder)
        head = (width, c.head_layers, c.head_heads, c.max_positions)
        flow = (c.drop_mu, c.drop_cond)
        self.speech_cfm = FlowHead(DiffusionHead(c.speech_dim, c.speaker_dim, *head), *flow)
        self.motion_cfm = FlowHead(DiffusionHead(c.motion_dim, c.motion_dim, *head), *flow)
        self.head_stop = StopPredictor(width)
        if c.phonemes:
            self.head_phoneme = nn.Linear(width, c.patch_size * c.phonemes)
        self.task_embedding = nn.Embedding(2, width)  # TTS, and T2AV for all other modes
        self.motion_pad_emb = nn.Parameter(torch.zeros(1, 1, width))  # replaces the motion part of TTS tokens

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.task_embedding.weight.device

    def embed_text(self, ids: Tensor) -> Tensor:
        """Embed token ids (B, T) -> (B, T, D)."""
        return self.llm.model.embed_tokens(ids)

    def speech_tokens(self, latents: Tensor, valid: Tensor | None = None) -> Tensor:
        """Encode speech latents (..., P, Ds) to tokens (..., D). Frames outside of `valid` (..., P) are zeroed after
        projection.
        """
        return self.speech_patch_encoder(_masked(self.projector_speech(latents), valid))

    def motion_tokens(self, motion: Tensor, valid: Tensor | None = None) -> Tensor:
        """Encode normalised motion (..., P, Dm) to tokens (..., D); see `speech_tokens`."""
        return self.motion_patch_encoder(_masked(self.projector_motion(motion), valid))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the backbone, and of the matrices of heads and encoders; see `engine.precision`."""
        return self.llm.model.embed_tokens.weight.dtype

    def to_precision(self, dtype: torch.dtype) -> TalkerT2AV:
        """Convert the weights in place, for generation. Do not save the result.

        The backbone is converted completely; of heads and encoders, only the matrices.
        """
        for parameter in self.llm.parameters():
            parameter.data = parameter.data.to(dtype)
        return convert_matrices(self, dtype, FLOAT32_MODULES)

    def backbone(self, embeds: Tensor, mask: Any = None, **cache: Any) -> Tensor:
        """Return hidden states (B, T, D) after the final norm. mask (B, S) is 1 at real tokens; mask and `cache` as in
        Qwen3Model.
        """
        return self.llm.model(inputs_embeds=embeds, attention_mask=mask, **cache).last_hidden_state

    def continue_cache(self, cache: KeyValues, tokens: Tensor, visible: Tensor, positions: Tensor) -> Tensor:
        """Add tokens (B, T, D) at positions (B, T) to a cache of N tokens. Return the state (B, D) after the last
        token, in float32.

        Args:
            visible: (B, T, N) attention mask over the cached tokens.
        """
        mask = {"full_attention": visible[:, None]}  # a mask given by layer type is used unchanged
        tokens = tokens.to(self.dtype)
        hidden = self.backbone(tokens, mask, position_ids=positions, past_key_values=cache, use_cache=True)
        return hidden[:, -1].float()

    @classmethod
    def from_upstream(cls, source: str | Path | dict[str, Tensor], config: TalkerConfig | None = None) -> TalkerT2AV:
        """Load the official checkpoint, a folder or file of safetensors or a state dict, in float32 and eval mode.

        Sizes are inferred from tensor shapes. Stored rotary tables are used, missing ones are computed.

        Raises:
            UserError: If a file or tensor is missing, or a shape does not match `config`.
        """
        state = source if isinstance(source, dict) else upstream.read_safetensors(source)
        config = config or TalkerConfig(**upstream.upstream_fields(state))
        with torch.device("meta"):
            model = cls(config)
        model.load_tensors(state, "the state dict" if isinstance(source, dict) else source)
        return model.eval()

    def load_tensors(self, state: dict[str, Tensor], source: str | Path) -> None:
        """Use the tensors of `state` (released names) as those of the model, in float32."""
        state = upstream.complete({k: v.float() for k, v in state.items()}, self)
        load_strict(self, state, source, assign=True)
        self.llm.tie_weights()
        # Rotary frequencies are not in the state dict, so they are missing in a model created on the meta device.
        self.llm.model.rotary_emb = type(self.llm.model.rotary_emb)(config=self.llm.config)

    def arguments(self) -> dict[str, Any]:
        return {"model": asdict(self.config)}

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> TalkerT2AV:
        with torch.device("meta"):
            return cls(TalkerConfig(**arguments["model"]))

    def release_state_dict(self) -> dict[str, Tensor]:
        return upstream.without_tied_weights(self)


class KeyValues:
    """KV cache (B, L, 2, H, N, h) with the interface of transformers' caches.

    Attributes:
        positions: (B, T) positions of the new tokens of each row. Rows may have different lengths.
    """

    def __init__(self, cache: Tensor, positions: Tensor) -> None:
        self.cache = cache
        self.positions = positions

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values (B, H, T, h) of a layer to the cache. Return all (B, H, N, h)."""
        index = self.positions[:, None, :, None].expand_as(keys)
        all_keys, all_values = self.cache[:, layer].unbind(1)
        return all_keys.scatter_(2, index, keys), all_values.scatter_(2, index, values)


def _masked(x: Tensor, valid: Tensor | None) -> Tensor:
    return x if valid is None else x * valid[..., None]
