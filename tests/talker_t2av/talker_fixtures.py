"""A whole Talker-T2AV of a few thousand random weights, and files for it.

Axes: F frames, N samples.
"""

from pathlib import Path

import numpy as np
import torch

from engine.media.audio import write_wav
from engine.media.video import write_video
from lia_x import LiaX, LiaXConfig
from talker_t2av.generation import BatchedDecoder, Result
from talker_t2av.model import TalkerConfig, TalkerT2AV
from talker_t2av.request import Mode, Request, Sampling
from talker_t2av.speaker.encoder import VoiceEncoder, VoiceEncoderConfig
from talker_t2av.text import byte_tokenizer
from whisperx_vae import WhisperXVAE, WhisperXVAEConfig

DS = 4
DM = 5
LLM = {
    "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 16, "intermediate_size": 48, "max_position_embeddings": 512,
}  # fmt: skip
VAE = WhisperXVAEConfig(
    encoder_width=2, hidden=16, latent_dim=DS, decoder_width=16, mel_bands=20, whisper_context=50, whisper_heads=2,
    whisper_layers=1,
)  # fmt: skip
MODEL = {  # of a training
    "llm": LLM, "speech_dim": DS, "motion_dim": DM, "encoder_layers": 1, "encoder_heads": 2, "head_layers": 2,
    "head_heads": 2, "max_positions": 16, "repeats": 1, "motion_weight": 1.0,
}  # fmt: skip
STATS = {"motion_mean": [0.1] * DM, "motion_std": [0.5] * DM}


def tiny_model(delay: int = 0, context: int = 1, seed: int = 0, motion_dim: int = DM, order: str = "add") -> TalkerT2AV:
    """Random weights, with a stop head whose verdict changes from step to step."""
    torch.manual_seed(seed)
    config = TalkerConfig(
        LLM, delay=delay, context=context, speech_dim=DS, motion_dim=motion_dim, encoder_layers=1, encoder_heads=2,
        head_layers=2, head_heads=2, max_positions=32, order=order,
    )  # fmt: skip
    model = TalkerT2AV(config).eval()
    torch.nn.init.normal_(model.motion_pad_emb)
    model.head_stop.head.weight.data *= 30
    return model


def request(length: int = 6, seed: int = 0, speech: int = 0, motion: int = 0, **more) -> Request:
    """A prompt of `length` tokens with random conditions, and so many given frames of each stream."""
    g = torch.Generator().manual_seed(1000 + seed)
    return Request(
        prompt=torch.randint(0, 250, (length,), generator=g).tolist(),
        speaker=torch.randn(256, generator=g),
        speech=torch.randn(speech, DS, generator=g),
        motion=torch.randn(motion, DM, generator=g),
        first_motion=torch.randn(DM, generator=g),
        seed=seed,
        **more,
    )


def generate(model: TalkerT2AV, requests: list[Request], mode: Mode, sampling: Sampling, **how) -> list[Result]:
    """All requests in one batch."""
    return BatchedDecoder(model, mode, sampling, len(requests), **how).generate(requests)


def utterance(asked: Request, speech: torch.Tensor, motion: torch.Tensor, slots: int) -> dict[str, torch.Tensor]:
    """The training batch of a request's prompt with these frames in `slots` places."""
    start = len(asked.prompt)
    return {
        "input_ids": torch.tensor([[*asked.prompt, *[7] * slots]]),
        "attention_mask": torch.ones(1, start + slots, dtype=torch.long),
        "speech_span": torch.tensor([[start, start + slots]]),
        "speech": speech[None],
        "speech_frames": torch.tensor([len(speech)]),
        "motion": motion[None],
        "motion_frames": torch.tensor([len(motion)]),
        "speaker": asked.speaker[None],
    }


def all_frames(asked: Request, result: Result) -> tuple[torch.Tensor, torch.Tensor]:
    """Speech and motion of a finished utterance, given and generated."""
    pairs = (asked.speech, result.speech), (asked.motion, result.motion)
    return tuple(given if made is None else torch.cat([given, made]) for given, made in pairs)


def assert_close(one: Result, other: Result, atol: float = 0.0) -> None:
    assert one.stopped == other.stopped
    for a, b in ((one.speech, other.speech), (one.motion, other.motion)):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=atol, rtol=0)


def latents(texts: list[str], name: str = "clip", seed: int = 0) -> list[tuple[dict, dict[str, torch.Tensor]]]:
    """Samples of shards with random latents, of 14, 17, 20, ... frames."""
    g = torch.Generator().manual_seed(seed)
    samples = []
    for i, text in enumerate(texts):
        frames = 14 + 3 * i
        key = f"{name}{i}"
        tensors = {
            "speech": torch.randn(frames, DS, generator=g),
            "motion": 0.5 * torch.randn(frames, DM, generator=g) + 0.1,
            "speaker": torch.randn(256, generator=g),
        }
        info = {"key": key, "text": text, "frames": frames, "source": f"{name.rstrip('_')}/{key}.mp4"}
        samples.append((info, {k: v.half() for k, v in tensors.items()}))
    return samples


def releases(root: Path, *names: str) -> dict[str, str]:
    """The codecs that `save_talker` left in `root`; all of them if none is named."""
    folders = {"speech": "speech", "motion": "motion", "speaker": "voice"}
    return {name: str(root / folders[name]) for name in names or folders}


def save_talker(root: Path, delay: int = 0) -> Path:
    """The releases `talker`, `speech`, `motion`, `voice` in `root`; gives the first."""
    model = tiny_model(delay)
    words = byte_tokenizer()
    torch.manual_seed(1)
    motion = LiaXConfig(style_dim=8, motion_dim=DM, scale=1, size=32, width=4, max_width=8, depth=1)
    WhisperXVAE(VAE).save_pretrained(root / "speech", "card")
    LiaX(motion).save_pretrained(root / "motion", "card")
    VoiceEncoder(VoiceEncoderConfig(bands=20, channels=16, pooled=16, bottleneck=4)).save_pretrained(
        root / "voice", "card"
    )
    model.save_pretrained(
        root / "talker",
        "card",
        {
            "motion": {"mean": [0.1] * DM, "std": [0.5] * DM},
            "codecs": {"speech": "speech", "motion": "motion", "speaker": "voice"},
            "sampling": {"steps": 3, "temperature": 0.8, "guidance": 1.5},
        },
    )
    words.save(root / "talker")
    return root / "talker"


def voice_file(path: Path, seconds: float = 0.8, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    write_wav(path, 0.2 * rng.standard_normal(round(24_000 * seconds)), 24_000)
    return path


def face_file(path: Path, frames: int = 15, height: int = 48, width: int = 64, seed: int = 0, sound: bool = False):
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 255, (frames, height, width, 3), np.uint8)
    audio = 0.2 * rng.standard_normal(960 * frames) if sound else None
    write_video(path, pictures, 25, audio, 24_000 if sound else None)
    return path
