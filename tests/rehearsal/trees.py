"""Small trees in the layouts of the data sets that the documentation names, of cartoon faces and the bundled voice."""

import io
import json
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
import torch

from engine.media.audio import read_audio, resample, write_wav
from engine.media.video import write_video
from tests.corpora.preparation_fakes import write_csv
from tests.drawn_faces import draw_face
from tests.media_files import ffmpeg

ROOT = Path(__file__).resolve().parents[2]
RATE = 24_000
FPS = 25
FRAMES = 30
SENTENCE = "set blue by hotel four now"
VIDEOS = ("Tr6MMsoWAog", "zSIcHhxeKbM", "0ABCdefGHij")  # of YouTube


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
        ffmpeg("-i", plain, *kind, path)
        plain.unlink()
    if text:
        path.with_suffix(".txt").write_text(f"Text:  {text.upper()}\nConf:  4\nRef: 0Fi83BHQsMA\n")


def write_sound(path: Path, number: int) -> bytes:
    """Write an audio file of the kind of its suffix and return its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wav = path.with_suffix(".wav")
    write_wav(wav, sound(number), RATE)
    if wav != path:
        ffmpeg("-i", wav, path)
        wav.unlink()
    return path.read_bytes()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def talker_data(root: Path) -> None:
    rows = []
    files = {}
    for number in range(4):
        wav = f"audio/clip{number}.wav"
        motion = f"motion/clip{number}.pt"
        buffer = io.BytesIO()
        files[wav] = write_sound(root / "audio.wav", number)
        torch.save(torch.randn(FRAMES, 40, generator=torch.Generator().manual_seed(number)), buffer)
        files[motion] = buffer.getvalue()
        rows.append({"motion_pt_path": motion, "wav_path": wav, "text": SENTENCE})
    for folder in ("metadata", "shards"):
        (root / folder).mkdir()
    write_tar(root / "shards" / "data-000.tar", files)
    write_csv(root / "metadata" / "train.csv", rows)


def emilia(root: Path) -> None:
    files = {}
    for number in range(4):
        name = f"EN_B00000_S0000{number}_W000000"
        facts = {"id": name, "wav": f"{name}.mp3", "text": f" {SENTENCE}.", "duration": FRAMES / FPS}
        facts |= {"speaker": name[:16], "language": "en", "dnsmos": 3.3}
        files[f"{name}.mp3"] = write_sound(root / "sound.mp3", number)
        files[f"{name}.json"] = json.dumps(facts).encode()
    write_tar(root / "EN" / "EN-B000000.tar", files)


# Clips by folder below the documentation's /data, in the layouts of the data sets.
CLIPS = {
    "lrs3": [f"{video}/00001.mp4" for video in ("pretrain/00j9bKdiOjk", "trainval/0Fi83BHQsMA", "trainval/0af00UcTOSc",
                                                "trainval/1H0vWuBNzUI", "test/a")],
    "lrs2": [f"main/{split}/00001.mp4" for split in ("train", "val", "test")],
    "vox2": [f"{speaker}/00001.mp4" for speaker in ("dev/mp4/id00012/21Uxsk56VDQ", "dev/mp4/id00015/21Uxsk56VDQ",
                                                    "dev/mp4/id00016/21Uxsk56VDQ", "test/mp4/id00017/01dfn2spqyE")],
    "grid": ["s3/lbbc1a.mpg", "s4/pgwi9s.mpg", "s5/prav6s.mpg", "s1/bbaf2n.mpg"],
    "youtube": [f"videos/{name}.mp4" for name in VIDEOS],
    "footage": ["clip0.mp4", "clip1.mp4", "clip2.mp4"],
    "..": ["clip.mp4", "clips/one.mp4", "clips/two.mp4", "F.mp4", "C.mp4"],  # beside it, of the examples
}  # fmt: skip


def write(work: Path) -> None:
    """Write the trees below WORK/data, and the files that the documentation's examples name."""
    data = work / "data"
    for folder, paths in CLIPS.items():
        for number, path in enumerate(paths):
            text = SENTENCE if folder in ("lrs2", "lrs3") else ""
            frames = 60 if folder == "youtube" else FRAMES
            write_clip(data / folder / path, number, frames, path == "clip.mp4", text)
    write_clip(data / "lrs3" / "test" / "a" / "00002.mp4", 7, text="bin red at alpha one soon")  # of the same speaker
    (data / "lrs2" / "test").symlink_to("main/test")  # docs/reproduce.md: the folder of the clips that test.txt lists
    for split in ("train", "val", "test"):
        (data / "lrs2" / f"{split}.txt").write_text(f"{split}/00001\n")
    rows = [f"{name},{start},{start + 1.2},0.5,0.5\n" for name in VIDEOS for start in (0.0, 1.0)]
    (data / "youtube" / "avspeech_train.csv").write_text("".join(rows))
    write_csv(data / "footage" / "clips.csv", [
        {"path": path, "text": SENTENCE, "split": "val" * (path == "clip2.mp4")} for path in CLIPS["footage"]
    ])  # fmt: skip
    talker_data(data / "talker_t2av_data")
    emilia(data / "emilia")
    for number, name in enumerate(("voice.wav", "V.wav", "S.wav")):
        write_sound(work / name, number)
    jobs = [{"mode": "tts", "text": "hello", "reference_audio": "V.wav"}]
    jobs.append({"mode": "a2v", "audio": "S.wav", "reference_video": "F.mp4"})
    (work / "many.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
