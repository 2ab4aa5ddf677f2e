"""Stages for tests: quick, and bad in all the ways in which a clip can be. Tables of clips, and samples of stages."""

import csv
import errno
import json
import os
import signal
import time

import torch
from safetensors.torch import load

from corpora.preparation.clip import Encoder, Stage
from engine.errors import UserError
from engine.shards.writer import read_members


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def read_sample(folder):
    """Return the JSON's values and the tensors of the one sample in a work folder."""
    (path,) = folder.glob("*.tar")
    members = {suffix: data for suffix, _, data in read_members(path.read_bytes())}
    assert list(members) == ["json", "safetensors"]
    return json.loads(members["json"]), load(members["safetensors"])


class Brightness(Stage):
    """A feature of the pictures, and disasters by the name of the clip."""

    tensors = ("motion",)

    def __init__(self, pause: float = 0.0):
        self.pause = pause

    def digests(self):
        return {"fake": "01234567"}

    def __call__(self, clip):
        name = clip.info.key
        if "segfault" in name:
            os.kill(os.getpid(), signal.SIGSEGV)
        if "hang" in name:
            time.sleep(60)
        if "refuse" in name:
            raise UserError(f"{clip.path(clip.info.source)}: not wanted")
        if "bug" in name:
            raise ZeroDivisionError("at 0x7f0011223344")
        if "full" in name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        time.sleep(self.pause)
        clip.tensors["motion"] = torch.from_numpy(clip.frames.mean((1, 2))).half()


class Colour(Stage):
    """A feature of the pictures that notes in a file for which clips it was computed."""

    needs = "frames"
    tensors = ("colour",)

    def __init__(self, log: str, scale: float = 1.0):
        self.log = log
        self.scale = scale

    def __call__(self, clip):
        with open(self.log, "a") as file:
            file.write(f"{clip.info.key}\n")
        clip.tensors["colour"] = torch.from_numpy(clip.frames.mean((0, 1, 2))) * self.scale


class Missing(Stage):
    """A stage whose package is not there."""

    def __init__(self):
        raise UserError("this requires nothing (no module): install it")


class Mean(Encoder):
    """A feature of the audio by an encoder, which refuses the clip that is named nan."""

    tensors = ("mean",)

    def __init__(self, device: torch.device):
        super().__init__(device)

    def digests(self):
        return {}

    def __call__(self, clip):
        if clip.info.key == "nan":
            raise UserError("not a number")
        clip.tensors["mean"] = torch.from_numpy(clip.wave16[::640].copy())
