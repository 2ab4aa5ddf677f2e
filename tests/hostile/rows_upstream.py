"""Checkpoints of other projects: files that are damaged, are not the expected model, or lack a tensor."""

from __future__ import annotations

import zipfile
from functools import partial
from pathlib import Path

import torch

from engine.release import load_strict
from hicodit.conditions.avhubert import AVHubert
from hicodit.conditions.poster2 import POSTER2
from lia_x import LiaX
from talker_t2av.speaker.encoder import WavLMEncoder
from talker_t2av.system import TalkerSystem
from tests.hostile.rows_files import file
from whisperx_vae import WhisperXVAE

TENSOR = {"a": torch.zeros(1)}
TRUNCATED = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.cut off"
FILES = [  # reader, file name, content (None: the file is missing), pattern of the error
    (AVHubert.from_pretrained, "a.pt", TRUNCATED, "not .*: create or download it"),
    (POSTER2.from_pretrained, "best.pth", {"state_dict": {}}, "'affectnet' or 'raf'"),
    (WavLMEncoder.from_pretrained, "a.pth", {"model": TENSOR}, "not a WavLM-ECAPA speaker encoder"),
    (LiaX.from_pretrained, "lia-x.pt", b"not a checkpoint", "not a readable checkpoint"),
    (LiaX.from_pretrained, "lia-x.pt", {"dec.rgb2.up.kernel": torch.zeros(4, 4)}, "low-pass"),
    (WhisperXVAE.from_pretrained, "a.ckpt", [1, 2], "a list"),
    (TalkerSystem, "absent", None, "weights folder not found"),
]
STATES = [  # state_dict for a layer with a weight of shape (1, 2), pattern of the error
    (TENSOR | {"weight": torch.zeros(1, 2)}, "unexpected tensor 'a'"),
    ({"weight": torch.zeros(3, 2)}, r"shape \(3, 2\), .* \(1, 2\)"),
]


def torch_script(folder: Path) -> None:
    torch.save([1], folder / "a.ckpt")
    with zipfile.ZipFile(folder / "a.ckpt", "a") as archive:
        archive.writestr("archive/constants.pkl", b"")
    WhisperXVAE.from_pretrained(folder)


def two_files(folder: Path) -> None:
    for name in ("a.ckpt", "b.ckpt"):
        (folder / name).write_bytes(b"")
    WhisperXVAE.from_pretrained(folder)


def load_state(folder: Path, state: dict[str, torch.Tensor]) -> None:
    load_strict(torch.nn.Linear(2, 1, bias=False), state, "a.pt")


CASES = [
    *(
        (f"upstream: {name}, {number}", file(name, content, read), line)
        for number, (read, name, content, line) in enumerate(FILES)
    ),
    *((f"upstream: {line}", partial(load_state, state=state), line) for state, line in STATES),
    ("upstream: TorchScript", torch_script, "TorchScript"),
    ("upstream: two checkpoints", two_files, "contains 2 checkpoints"),
]
