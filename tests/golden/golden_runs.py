"""Four seeded training steps of every task at toy size on made data, through the trainer; their losses are in git.

    python -m tests.golden.golden_runs [NAME ...]     # writes tests/golden/losses/NAME.json anew

Write them anew only for a change that is meant to change training, and say in the commit which figures moved and why.

Axes: B batch, T video frames, L = 2 T token frames, K token levels, F latent frames, N samples, S picture side.
"""

import hashlib
import json
import platform
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate

from engine.training.settings import TrainerConfig
from engine.training.task import Task
from engine.training.trainer import Trainer
from hicodit.data import HiCoDiTDataset
from hicodit.task import HiCoDiTTask
from lia_x.task import LiaXTask
from rvq_codec import RVQCodec, RVQCodecConfig
from rvq_codec.task import RVQCodecTask
from talker_t2av.data import SequenceFormat, collate
from talker_t2av.speaker.task import VoiceEncoderTask
from talker_t2av.task import TalkerTask
from talker_t2av.text import byte_tokenizer
from tests.shard_files import write_split
from tests.talker_t2av.talker_fixtures import MODEL
from tests.tiny import DISCRIMINATORS, ENCODERS, HICODIT, LIA_X, RVQ, WHISPERX_VAE
from whisperx_vae.task import WhisperXVAETask

FOLDER = Path(__file__).parent / "losses"
DIGITS = 7  # of a printed loss: what float32 holds
TRAINER = asdict(TrainerConfig()) | {
    "steps": 4, "accumulate": 1, "lr": 1e-3, "betas": [0.9, 0.98], "weight_decay": 0.01, "warmup": 2,
    "schedule": "cosine", "min_lr_ratio": 0.1, "clip": 1.0, "ema_decay": 0.9, "precision": "fp32", "seed": 0,
    "log_every": 1, "validate_every": 100, "checkpoint_every": 100,
}  # fmt: skip
NOT_LOSSES = ("samples_per_s", "tokens_per_s", "data_wait", "step_s", "mfu", "memory_gib", "lr")


class Made:
    """A training set of items that are there already, taken `batch` at once."""

    def __init__(self, items: list[Any], collate: Callable = default_collate, batch: int = 2) -> None:
        self.items = items
        self.collate = collate
        self.batch = batch

    def __len__(self) -> int:
        return len(self.items)

    def load(self, index: int, generator: torch.Generator) -> Any:
        return self.items[index]


def waves(count: int, samples: int) -> Tensor:
    """(count, 1, N): gliding tones in noise, at 24 kHz."""
    g = torch.Generator().manual_seed(1)
    t = torch.arange(samples) / 24_000
    pitch = torch.linspace(100, 300, count)[:, None]
    tones = 0.3 * torch.sin(2 * torch.pi * pitch * (1 + t) * t)
    return (tones + 0.02 * torch.randn(count, samples, generator=g))[:, None]


def hicodit(folder: Path) -> tuple[Task, Made]:
    """A tokenizer in `folder`, and clips of three lengths."""
    codec = RVQCodecConfig(
        encoder_width=2, ratios=(8, 5, 4, 3), latent_channels=8, codebook_size=16, codebook_dim=4, vocos_dim=8,
        vocos_intermediate=8, vocos_layers=1, n_fft=960,
    )  # fmt: skip
    RVQCodec(codec).save_pretrained(folder / "codec", "made for a test")
    g = torch.Generator().manual_seed(0)
    items = []
    for frames in (14, 15, 13):
        items.append(
            {
                "mouth": torch.rand(frames, 48, 48, generator=g),
                "face": torch.rand(3, 64, 64, generator=g),
                "tokens": torch.randint(16, (2 * frames, 12), generator=g),
                "ge2e": torch.nn.functional.normalize(torch.rand(256, generator=g), dim=-1),
                "expression": torch.tensor([len(items), 3 - len(items)]),
                "face_expression": torch.tensor(len(items)),
                "phoneme": torch.randint(5, (frames,), generator=g),
            }
        )
    task = HiCoDiTTask(HICODIT | {"dropout": 0.1}, ENCODERS, str(folder / "codec"), "none", "none.jsgf")
    return task, Made(items, HiCoDiTDataset.collate)


def talker_t2av(folder: Path, with_motion: bool = True, phonemes: int = 0) -> tuple[Task, Made]:
    stats = {"motion_mean": [0.0] * 5, "motion_std": [1.0] * 5}
    (folder / "stats.json").write_text(json.dumps(stats))
    words = byte_tokenizer()
    format = SequenceFormat(words.speech_id, words.tail)
    g = torch.Generator().manual_seed(0)
    pairs = []
    for i, text in enumerate(("lay blue", "set red now", "bin green at two")):
        frames = 14 + 3 * i
        speech, motion, speaker = (torch.randn(*shape, generator=g) for shape in ((frames, 4), (frames, 5), (256,)))
        kinds = (motion, motion[:0]) if with_motion else (motion[:0],)
        pairs.append([format.example(words.prompt(text), speech, frames, kind, speaker) for kind in kinds])

    def together(items: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
        return collate([row for kind in zip(*items) for row in kind], words.pad_id, 4)

    codecs = {"speech": "a", "motion": "b", "speaker": "c"}
    task = TalkerTask(MODEL | {"repeats": 2, "phonemes": phonemes}, codecs, str(folder / "stats.json"))
    return task, Made(pairs, together)


def talker_tts(folder: Path) -> tuple[Task, Made]:
    return talker_t2av(folder, with_motion=False)


def rvq_codec(folder: Path) -> tuple[Task, Made]:
    """Features; code books; both with discriminators, after a restart of dead codes.

    The warm start by k-means is left out: its axes have the signs that a machine's eigenvectors happen to have.
    """
    weights = {"mel": 15.0, "stft": 0.0, "spectrum": 2.0, "disturbance": 0.0, "feature": 2.0, "adversarial": 1.0}
    features = {"mel_bands": 8, "low_samples": 4, "until": 1, "envelope_levels": 1, "keep": 0.5}
    mel = {"n_mels": [10, 40], "windows": [128, 512], "clamp": 1e-4}
    stages = {"features": features, "quantizer_start": 0, "gan_start": 2, "restart_every": 2, "pool": 500}
    task = RVQCodecTask(RVQ, mel, weights, **DISCRIMINATORS, **stages)
    return task, Made([{"wave": wave} for wave in waves(3, 2400)])


def whisperx_vae(folder: Path) -> tuple[Task, Made]:
    """Two steps without discriminators and two with them."""
    weights = {"mel": 15.0, "adversarial": 1.0, "feature": 2.0, "kl": 0.01, "semantic": 1.0, "targets": 1.0}
    task = WhisperXVAETask(
        WHISPERX_VAE, {"n_mels": [10, 40], "windows": [128, 512]}, weights, **DISCRIMINATORS, gan_start=2
    )
    return task, Made([{"wave": wave} for wave in waves(3, 6720)])


def lia_x(folder: Path) -> tuple[Task, Made]:
    weights = {"l1": 10.0, "structural": 1.0, "perceptual": 0.0, "adversarial": 1.0, "sparsity": 0.01}
    items = []
    for i in range(3):
        frames = torch.full((2, 32, 32, 3), 90 + 20 * i, dtype=torch.uint8)
        for t, top in enumerate((4, 16)):
            frames[t, top : top + 8, 8 + 4 * i : 16 + 4 * i] = torch.tensor([230, 200, 40], dtype=torch.uint8)
        items.append({"frames": frames, "tracks": torch.tensor([[0.2, -0.1 * i], [-0.4, 0.3]])})
    sizes = {"width": 4, "max_width": 8}
    guide = {"weight": 2.0, "until": 2}
    return LiaXTask(LIA_X, weights, pyramid=2, guide=guide, motion_noise=0.05, discriminator=sizes), Made(items)


def voice_encoder(folder: Path) -> tuple[Task, Made]:
    g = torch.Generator().manual_seed(0)
    ge2e = torch.nn.functional.normalize(torch.rand(6, 256, generator=g), dim=-1)
    infos = [{"key": f"c{i}", "speaker": str(i // 2), "frames": 1} for i in range(6)]
    write_split(folder / "train", [(info, {"ge2e": one}) for info, one in zip(infos, ge2e)], 6, digests={"ge2e": "x"})
    sizes = {"bands": 20, "channels": 16, "pooled": 16, "bottleneck": 4, "embedding": 256}
    task = VoiceEncoderTask(sizes, folder, folder)
    mels = torch.randn(6, 20, 50, generator=g)
    items = [{"mel": mels[i], "ge2e": ge2e[i], "voice": torch.tensor(i // 2)} for i in range(6)]
    return task, Made(items, batch=5)  # batch norm of two is as good as a sign


RUNS = {
    run.__name__: run
    for run in (
        hicodit, talker_t2av, talker_tts, rvq_codec, whisperx_vae, lia_x, voice_encoder,
    )
}  # fmt: skip


def machine() -> dict[str, str]:
    """What rounding depends on: the processor, the kernels that PyTorch picks for it, and PyTorch."""
    processor = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        first = info.read_text().split("\n\n")[0]
        fields = dict(re.findall(r"^(cpu family|model name|model|stepping)\s*:\s*(.*?)\s*$", first, re.MULTILINE))
        processor = " ".join(fields.get(name, "") for name in ("model name", "cpu family", "model", "stepping")).strip()
    kernels = torch.backends.cpu.get_cpu_capability()
    return {
        "processor": processor or platform.machine(), "kernels": kernels, "torch": torch.__version__,
        "rounding": rounding(),
    }  # fmt: skip


def rounding() -> str:
    """Return eight hex digits of sums on one thread. Kernels also order them by what the name does not tell: caches."""
    g = torch.Generator().manual_seed(0)
    digest = hashlib.sha256()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for n in (3, 24, 96, 500):
        x = torch.randn(n, 48, generator=g)
        weight = torch.randn(48, 144, generator=g, requires_grad=True)
        q, k, v = (x @ weight).unflatten(-1, (4, 36)).transpose(0, 1).split(12, -1)
        y = F.layer_norm(F.scaled_dot_product_attention(q[None], k[None], v[None]), (12,)).log_softmax(-1)
        y = F.conv1d(y.flatten(0, 2).T[None], torch.randn(24, 12, 3, generator=g)).square().mean()
        digest.update(torch.autograd.grad(y, weight)[0].numpy().tobytes() + y.detach().numpy().tobytes())
    torch.set_num_threads(threads)
    return digest.hexdigest()[:8]


def losses_of(name: str) -> list[dict[str, float]]:
    """Logged losses of each step of a run, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            torch.manual_seed(0)
            task, data = RUNS[name](folder)
            task.measure = lambda folder, share: {}
            config = TrainerConfig(**TRAINER | {"batch_size": data.batch})
            Trainer(task, data, config, folder / "run").fit()
            lines = map(json.loads, (folder / "run" / "log.jsonl").read_text().splitlines())
            steps = [{k: v for k, v in line.items() if k not in NOT_LOSSES} for line in lines if "lr" in line]
    finally:
        torch.set_num_threads(threads)
    return [{k: float(f"{v:.{DIGITS}g}") for k, v in step.items()} for step in steps]


if __name__ == "__main__":
    for name in sys.argv[1:] or RUNS:
        rows = ",\n".join(f"  {json.dumps(row)}" for row in losses_of(name))
        path = FOLDER / f"{name}.json"
        path.write_text(f'{{\n "machine": {json.dumps(machine())},\n "steps": [\n{rows}\n ]\n}}\n')
        print(path)
