"""Rows of files of others: what stands in place of a released checkpoint, or of one of its tensors, and is none."""

from __future__ import annotations

import zipfile
from functools import partial
from pathlib import Path

import torch

from engine.release import load_strict
from hicodit.conditions.arcface import ArcFace
from hicodit.conditions.avhubert import AVHubert
from hicodit.conditions.poster2 import POSTER2
from lia_x import LiaX
from talker_t2av.speaker.encoder import WavLMEncoder
from talker_t2av.system import TalkerSystem
from tests.hostile.rows_files import file
from whisperx_vae import WhisperXVAE

A = {"a": torch.zeros(1)}
FILES = [  # what reads a file, its name, its content, and the line; None: there is no file
    (
        AVHubert.from_pretrained,
        "a.pt",
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.cut off",
        "not .*: create or download it",
    ),
    (ArcFace.from_pretrained, "a.pt", {"conv1.weight": torch.zeros(1)}, "ArcFace"),
    (POSTER2.from_pretrained, "best.pth", {"state_dict": {}}, "'affectnet' or 'raf'"),
    (POSTER2.from_pretrained, "raf-db-model_best.pth", {"state_dict": A}, "has no tensor"),
    (WavLMEncoder.from_pretrained, "", None, "download_checkpoints"),
    (WavLMEncoder.from_pretrained, "a.pth", {"model": A}, "not a WavLM-ECAPA speaker encoder"),
    (LiaX.from_pretrained, "lia-x.pt", b"not a checkpoint", "not a readable checkpoint"),
    (LiaX.from_pretrained, "lia-x.pt", {"dec.rgb2.up.kernel": torch.zeros(4, 4)}, "low-pass"),
    (WhisperXVAE.from_pretrained, "a.ckpt", [1, 2], "a list"),
    (WhisperXVAE.from_pretrained, "a.ckpt", {"state_dict": A}, "not a WhisperX-VAE"),
    (TalkerSystem, "absent", None, "weights folder not found"),
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


def of_a_line(folder: Path, state: dict[str, torch.Tensor]) -> None:
    load_strict(torch.nn.Linear(2, 1, bias=False), state, "a.pt")


CASES = [
    *(
        (f"released: {name or 'folder'}, {number}", file(name, content, read), line)
        for number, (read, name, content, line) in enumerate(FILES)
    ),
    (
        "released: a tensor too many",
        partial(of_a_line, state=A | {"weight": torch.zeros(1, 2)}),
        "unexpected tensor 'a'",
    ),
    (
        "released: another shape",
        partial(of_a_line, state={"weight": torch.zeros(3, 2)}),
        r"shape \(3, 2\), .* \(1, 2\)",
    ),
    ("released: TorchScript", torch_script, "TorchScript"),
    ("released: two checkpoints", two_files, "holds 2 checkpoints"),
]
