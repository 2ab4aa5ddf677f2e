"""Small trees in the layouts of the data sets that the documentation names, of drawn faces and the bundled voice."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import tarfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch

from engine.media.audio import read_audio, resample, write_wav
from engine.media.ffmpeg import command
from engine.media.video import write_video
from tests.drawn_faces import draw_face

ROOT = Path(__file__).resolve().parents[2]
RATE, FPS, FRAMES = 24_000, 25, 30
SENTENCE = "set blue by hotel four now"


@cache
def voice() -> np.ndarray:
    return np.tile(read_audio(ROOT / "assets" / "demo" / "voice.wav", RATE), 3)


def sound(number: int, frames: int = FRAMES) -> np.ndarray:
    """Return a part of the bundled voice, of another pitch for each number."""
    wave = torch.from_numpy(voice()[1000 * number :])
    return resample(wave, 20, 18 + number % 5).numpy()[: frames * RATE // FPS]


def write_clip(path: Path, number: int, frames: int = FRAMES, silent: bool = False, text: str = "") -> None:
    """Write a talking face; .mpg is MPEG-1. text: of a .txt file beside it, in LRS's format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    faces = np.stack([draw_face((number + i) % 6 / 6, 160) for i in range(frames)])
    plain = path.with_suffix(".mp4")
    write_video(plain, faces, FPS, None if silent else sound(number, frames), RATE)
    if path.suffix == ".mpg":
        kind = ["-c:v", "mpeg1video", "-c:a", "mp2", "-ar", "44100", "-vf", "scale=-2:288,pad=360:288:(ow-iw)/2:0"]
        subprocess.run(command("-v", "error", "-i", str(plain), *kind, str(path)), check=True)
        plain.unlink()
    if text:
        path.with_suffix(".txt").write_text(f"Text:  {text.upper()}\nConf:  4\nRef: 0Fi83BHQsMA\n")


def write_sound(path: Path, number: int) -> bytes:
    """Write a sound file of the kind of its suffix and return its bytes."""
    wav = path.with_suffix(".wav")
    write_wav(wav, sound(number), RATE)
    if wav != path:
        subprocess.run(command("-v", "error", "-i", str(wav), str(path)), check=True)
        wav.unlink()
    return path.read_bytes()


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def lrs3(root: Path) -> None:
    videos = ("pretrain/00j9bKdiOjk", "trainval/0Fi83BHQsMA", "trainval/0af00UcTOSc", "trainval/1H0vWuBNzUI", "test/a")
    for number, video in enumerate(videos):
        write_clip(root / video / "00001.mp4", number, text=SENTENCE)


def lrs2(root: Path) -> None:
    for number, name in enumerate(("train", "val", "test")):
        write_clip(root / "main" / name / "00001.mp4", number, text=SENTENCE)
        (root / f"{name}.txt").write_text(f"{name}/00001\n")


def voxceleb2(root: Path) -> None:
    for number, speaker in enumerate(("id00012", "id00015", "id00016")):
        write_clip(root / "dev" / "mp4" / speaker / "21Uxsk56VDQ" / "00001.mp4", number)
    write_clip(root / "test" / "mp4" / "id00017" / "01dfn2spqyE" / "00001.mp4", 4)


def grid(root: Path) -> None:
    for number, name in enumerate(("s3/lbbc1a", "s4/pgwi9s", "s5/prav6s", "s1/bbaf2n")):
        write_clip(root / f"{name}.mpg", number)


def talker_data(root: Path) -> None:
    rows, files = [], {}
    for number in range(4):
        wav, motion, buffer = f"audio/clip{number}.wav", f"motion/clip{number}.pt", io.BytesIO()
        files[wav] = write_sound(root / "audio.wav", number)
        torch.save(torch.randn(FRAMES, 40, generator=torch.Generator().manual_seed(number)), buffer)
        files[motion] = buffer.getvalue()
        rows.append({"motion_pt_path": motion, "wav_path": wav, "text": SENTENCE})
    write_tar(root / "data-000.tar", files)
    write_rows(root / "train.csv", rows)


def emilia(root: Path) -> None:
    files = {}
    for number in range(4):
        name = f"EN_B00000_S0000{number}_W000000"
        facts = {"id": name, "wav": f"{name}.mp3", "text": f" {SENTENCE}.", "duration": FRAMES / FPS}
        facts |= {"speaker": name[:16], "language": "en", "dnsmos": 3.3}
        files[f"{name}.mp3"] = write_sound(root / "sound.mp3", number)
        files[f"{name}.json"] = json.dumps(facts).encode()
    write_tar(root / "EN" / "EN-B000000.tar", files)


def youtube(root: Path) -> None:
    names = ("Tr6MMsoWAog", "zSIcHhxeKbM", "0ABCdefGHij")
    for number, name in enumerate(names):
        write_clip(root / "videos" / f"{name}.mp4", number, frames=60)
    rows = [f"{name},{start},{start + 1.2},0.5,0.5\n" for name in names for start in (0.0, 1.0)]
    (root / "avspeech_train.csv").write_text("".join(rows))


def footage(root: Path) -> None:
    rows = [{"path": f"clip{i}.mp4", "text": SENTENCE, "split": "val" * (i == 2)} for i in range(3)]
    for number, row in enumerate(rows):
        write_clip(root / row["path"], number)
    write_rows(root / "clips.csv", rows)


TREES: dict[str, Callable[[Path], None]] = {  # by folder below the documentation's /data
    "lrs3": lrs3, "lrs2": lrs2, "vox2": voxceleb2, "grid": grid, "talker_t2av_data": talker_data, "emilia": emilia,
    "youtube": youtube, "footage": footage,
}  # fmt: skip


def write(work: Path) -> None:
    """Write the trees below WORK/data, and the files that the documentation's examples name."""
    for name, make in TREES.items():
        (work / "data" / name).mkdir(parents=True)
        make(work / "data" / name)
    for number, name in enumerate(("clip.mp4", "clips/one.mp4", "clips/two.mp4", "F.mp4", "C.mp4")):
        write_clip(work / name, number, silent=number == 0)
    for number, name in enumerate(("voice.wav", "V.wav", "S.wav")):
        write_sound(work / name, number)
    jobs = [{"mode": "tts", "text": "hello", "reference_audio": "V.wav"}]
    jobs.append({"mode": "a2v", "audio": "S.wav", "reference_video": "F.mp4"})
    (work / "many.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
