"""Two training steps of each paper recipe at full size, from made-up shards: seconds by part, memory, frozen networks.

    python scripts/benchmark.py recipes --recipes hicodit_paper talker_paper rvq_paper

The shards hold what the recipe reads, in the shapes of the released encoders and codecs, with random values. Recipes
run as `train.py` composes them, with a smaller batch and in float32; `talker_paper` and `talker_released` without
their warm start, `lia_x_paper` without its perceptual loss, but in bf16 and with recomputed activations. `frozen` names
the networks that ran in a step and are not trained: HiCoDiT and Talker-T2AV have none, as shards hold their features.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from safetensors.torch import save
from torch import Tensor, nn

from benchmarks.common import in_own_process, peak_memory_mb, read_config
from benchmarks.training import Clock
from engine.config import build, load
from engine.shards.writer import SplitWriter, write_sample
from engine.training.trainer import Trainer
from hicodit.conditions.types import windows_of
from lia_x.data import pack_portraits
from rvq_codec import RVQCodec, RVQCodecConfig

LEAST = {"clips": 1}
CLIPS = 4  # of the made-up split


def hicodit_clip(frames: int, g: torch.Generator) -> dict[str, Tensor]:
    classes = torch.randint(7, (2, windows_of(frames)), generator=g).to(torch.uint8)
    return {
        "lip": torch.randn(frames, 1024, generator=g).half(),
        "face_identity": torch.randn(4, 512, generator=g).half(),
        "ge2e": nn.functional.normalize(torch.rand(256, generator=g), dim=-1),
        "expression": classes[0],
        "heard_expression": classes[1],
        "tokens": torch.randint(1024, (2 * frames, 12), generator=g).to(torch.int16),
    }


def talker_clip(frames: int, g: torch.Generator) -> dict[str, Tensor]:
    widths = {"speech": 32, "motion": 40}
    latents = {name: torch.randn(frames, width, generator=g).half() for name, width in widths.items()}
    return latents | {"speaker": torch.randn(256, generator=g).half()}


def sound_clip(frames: int, g: torch.Generator) -> dict[str, Tensor]:
    return {"wave": (3000 * torch.randn(960 * frames, generator=g)).to(torch.int16)}


def picture_clip(frames: int, g: torch.Generator) -> dict[str, Tensor]:
    pictures = torch.randint(256, (12, 512, 512, 3), generator=g).to(torch.uint8)
    return dict(zip(("portraits", "portraits_at"), pack_portraits(pictures.numpy(), 512)))


TALKER = ["data.train.codecs=null", "task.stats=null", "task.warm_start=null", "task.tokenizer=assets/talker_t2av_tiny"]
TALKER += [f"task.codecs.{name}=null" for name in ("speech", "motion", "speaker")]
HICODIT = ["data.expression=heard", "task.codec={folder}/codec", "task.encoders.folder={folder}"]
LIA_X = ["task.weights.perceptual=0", "task.vgg=null", "data.needs=null"]
LIA_X += ["trainer.checkpointing=true", "trainer.precision=bf16"]
RECIPES: dict[str, tuple[Callable[..., dict[str, Tensor]], float, list[str]]] = {  # clip, its seconds, settings
    "hicodit_paper": (hicodit_clip, 7.8, HICODIT),
    "talker_paper": (talker_clip, 6.0, TALKER),
    "talker_released": (talker_clip, 6.0, TALKER),
    "rvq_paper": (sound_clip, 4.0, []),
    "whisperx_vae_paper": (sound_clip, 6.0, ["task.whisper={folder}/whisper"]),
    "lia_x_paper": (picture_clip, 4.0, LIA_X),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["hicodit_paper"], help="recipes to run")
    parser.add_argument("--clips", type=int, default=1, help="clips (Talker: pairs) of a batch")


def run(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    for name in args.recipes:
        result = in_own_process(two_steps, name, args.clips, args.device.type)
        seconds = result["seconds_a_step"]
        parts = f"{sum(seconds.values()):.1f} s a step ({', '.join(f'{k} {v:.1f}' for k, v in seconds.items())})"
        frozen = ", ".join(result["frozen"]) or "none"
        yield (
            result,
            f"{name}: {result['parameters_m']:.0f} M parameters, {parts}, "
            f"peak {result['peak_gib']:.1f} GiB, losses {result['losses']}, frozen networks in a step: {frozen}",
        )


def two_steps(name: str, clips: int, device: str) -> dict[str, Any]:
    """Figures of two steps: losses, seconds of the second one's parts, peak memory, frozen networks that ran."""
    clip, clip_seconds, settings = RECIPES[name]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        digests = dict.fromkeys(("wave", "portraits", "heard_expression", "lip", "face_identity"), "made up")
        if name == "hicodit_paper":
            codec = RVQCodec(RVQCodecConfig(**read_config("codec/rvq_maskgct")))
            codec.save(folder / "codec", "random weights")
            digests["rvq"] = RVQCodec.from_pretrained(folder / "codec").digest()
            del codec
        if name == "whisperx_vae_paper":
            write_whisper(folder / "whisper")
        write_shards(folder / "shards", round(25 * clip_seconds), clip, digests)
        own = [setting.format(folder=folder) for setting in settings]
        small = ["trainer=cpu", "trainer.precision=fp32", f"trainer.batch_size={clips}"]
        small.append("trainer.global_batch_size=null")
        common = [f"experiment={name}", "data=shards", f"data.root={folder / 'shards'}", f"trainer.device={device}"]
        config = load("train", [*common, *small, *own, "trainer.ema_decay=0", f"run={folder / 'run'}"], "")
        torch.manual_seed(config.trainer.seed)
        trainer = Trainer(
            build(config.task),
            build(config.data.train),
            OmegaConf.to_container(config.trainer, resolve=True),
            config.run,
        )
        trainer.task.train()
        frozen = watch_frozen(trainer.task)
        (_, first), (spent, second) = timed_step(trainer, 0), timed_step(trainer, 1)
        encoders = getattr(getattr(trainer.task, "system", None), "encoders", None)
        loaded = sorted(getattr(encoders, "_networks", {}))
    return {
        "recipe": name,
        "clips": clips,
        "parameters_m": sum(p.numel() for p in trainer.task.parameters()) / 1e6,
        "losses": [round(first, 3), round(second, 3)],
        "seconds_a_step": spent,
        "peak_gib": peak_memory_mb(device) / 1024,
        "frozen": sorted({*frozen, *loaded}),
    }


def timed_step(trainer: Trainer, number: int) -> tuple[dict[str, float], float]:
    """One step as the trainer makes it: seconds by part, and the last part's loss."""
    clock = Clock(trainer.device)
    clock.start()
    batch = {k: v.to(trainer.device) if isinstance(v, Tensor) else v for k, v in trainer.batches[number].items()}
    clock.stop("data")
    for part, optimiser in trainer.optimisers.items():
        trainer.task.zero_grad(set_to_none=True)
        with torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.config.precision == "bf16"):
            loss = trainer.parallel.losses(batch, part)["loss"]
        clock.stop("forward")
        loss.backward()
        clock.stop("backward")
        for group in trainer.clipped[part]:
            trainer.parallel.clip(group, trainer.config.clip or np.inf)
        clock.stop("clip")
        optimiser.step()
        clock.stop("optimiser")
    return dict(clock.sums), float(loss.detach())


def watch_frozen(task: nn.Module) -> set[str]:
    """Names, filled in while `task` runs, of networks that run and of which nothing is trained."""
    ran: set[str] = set()
    for name, module in task.named_modules():
        owned = list(module.parameters(recurse=False))
        if owned and not any(p.requires_grad for p in owned) and not isinstance(module, nn.Embedding):
            top = ".".join(name.split(".")[:2])
            module.register_forward_hook(lambda *_, top=top: ran.add(top))
    return ran


def write_shards(root: Path, frames: int, clip: Callable[..., dict[str, Tensor]], digests: dict[str, str]) -> None:
    """ROOT/train: made-up clips of so many frames."""
    g, keys = torch.Generator().manual_seed(0), [f"clip{i}" for i in range(CLIPS)]
    writer = SplitWriter(root / "train", keys, CLIPS, {"made": "up"}, "motion", 0, 1, {}, False)
    (shard,) = writer.mine
    work = writer.begin(shard)
    for key in keys:
        about = {"key": key, "frames": frames, "seconds": frames / 25, "text": "set blue by hotel four now"}
        write_sample(work, key, {"json": json.dumps(about).encode(), "safetensors": save(clip(frames, g))})
    writer.pack(shard)
    writer.finish({"split": "train", "stages": [], "digests": digests, "symbols": None})


def write_whisper(folder: Path) -> None:
    """A folder with Whisper large-v3's sizes and random weights; its decoder, which is not used, has one layer."""
    from transformers import WhisperConfig, WhisperModel

    sizes = {
        "d_model": 1280,
        "num_mel_bins": 128,
        "encoder_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
    }
    config = WhisperConfig(**sizes, decoder_layers=1, decoder_attention_heads=20, vocab_size=51866)
    WhisperModel(config).save_pretrained(folder)
