"""Small trees in the exact layouts of the data sets, of drawn faces and the bundled voice (and the real clip).

Each builder makes one folder. Most have a damaged video, LRS also a clip that is too short and a text that is none:
preparation must leave them out and go on.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch

from engine.media.audio import read_audio, resample, write_wav
from engine.media.ffmpeg import command
from engine.media.video import write_video
from tests.drawn_faces import draw_face

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT.parent / "shared" / "samples"
RATE, FPS = 24_000, 25
FRAMES = 30
WATCH = "https://www.youtube.com/watch?v="
SENTENCE = "SET BLUE BY HOTEL FOUR NOW"


@cache
def voice() -> np.ndarray:
    return np.tile(read_audio(ROOT / "assets" / "demo" / "voice.wav", RATE), 3)


def sound(number: int, frames: int = FRAMES) -> np.ndarray:
    """A part of the bundled voice, of another pitch for each number."""
    wave = torch.from_numpy(voice()[1000 * number :])
    return resample(wave, 20, 18 + number % 5).numpy()[: frames * RATE // FPS]


def picture(number: int, frames: int = FRAMES, side: int = 160) -> np.ndarray:
    """A talking face; the light differs from number to number."""
    faces = np.stack([draw_face((number + i) % 6 / 6, side) for i in range(frames)])
    return (faces * (0.8 + 0.1 * (number % 3))).astype(np.uint8)


def write_clip(path: Path, number: int, frames: int = FRAMES, silent: bool = False) -> Path:
    """A video by its suffix: .mp4 with H.264, .mpg with MPEG-1, .flv with Sorenson's codec, .webm with VP8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = None if silent else sound(number, frames)
    plain = path if path.suffix == ".mp4" else path.with_suffix(".tmp.mp4")
    write_video(plain, picture(number, frames), FPS, wave, RATE)
    if plain != path:
        wide = "scale=-2:{1},pad={0}:{1}:(ow-iw)/2:0"
        kinds = {
            ".mpg": ["-c:v", "mpeg1video", "-c:a", "mp2", "-ar", "44100", "-vf", wide.format(360, 288)],
            ".flv": ["-c:v", "flv1", "-c:a", "mp3", "-ar", "44100", "-r", "29.97", "-vf", wide.format(480, 360)],
            ".webm": ["-c:v", "libvpx", "-c:a", "libopus", "-deadline", "realtime"],
        }
        call = command("-v", "error", "-i", str(plain), *kinds[path.suffix], str(path))
        subprocess.run(call, check=True)
        plain.unlink()
    return path


def write_sound(path: Path, wave: np.ndarray) -> Path:
    """A sound file of the kind of its suffix."""
    plain = path.with_suffix(".wav")
    write_wav(plain, wave, RATE)
    if plain != path:
        subprocess.run(command("-v", "error", "-i", str(plain), str(path)), check=True)
        plain.unlink()
    return path


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lrs_text(path: Path, words: str = SENTENCE) -> None:
    path.write_text(f"Text:  {words}\nConf:  4\nRef: 0Fi83BHQsMA\n\nWORD START END ASDSCORE\nSET 0.10 0.25 5.0\n")


def lrs(folder: Path, videos: Sequence[str], number: int) -> None:
    """VIDEO/00001.mp4 and .txt."""
    for i, video in enumerate(videos):
        lrs_text(write_clip(folder / video / "00001.mp4", number + i).with_suffix(".txt"))


def bad_clips(folder: Path) -> None:
    """Three clips of LRS that cannot be used."""
    lrs_text(write_clip(folder / "00002.mp4", 1).with_suffix(".txt"))
    damage(folder / "00002.mp4")
    lrs_text(write_clip(folder / "00003.mp4", 2, frames=6).with_suffix(".txt"))
    write_clip(folder / "00004.mp4", 3).with_suffix(".txt").write_bytes(b"\xff\xfe\x00")


def lrs3(root: Path) -> None:
    lrs(root / "pretrain", ["00j9bKdiOjk"], 1)
    lrs(root / "trainval", ["0Fi83BHQsMA", "0af00UcTOSc", "1H0vWuBNzUI"], 2)
    lrs(root / "test", ["0Fi83BHQsMB"], 6)
    bad_clips(root / "trainval" / "0af00UcTOSc")


def lrs2(root: Path) -> None:
    names = ["5535415699068794046", "5535496873950688380", "5541667345183346450"]
    lrs(root / "main", names, 1)
    lrs(root / "pretrain", names[:1], 5)
    bad_clips(root / "main" / names[0])
    (root / "train.txt").write_text("".join(f"{names[0]}/0000{number}\n" for number in (1, 2, 3, 4)))
    (root / "val.txt").write_text(f"{names[1]}/00001\n")
    (root / "test.txt").write_text(f"{names[2]}/00001 NF\n")
    (root / "pretrain.txt").write_text(f"{names[0]}/00001\n")


def voxceleb2(root: Path) -> None:
    for number, speaker in enumerate(("id00012", "id00015", "id00016")):
        path = write_clip(root / "dev" / "mp4" / speaker / "21Uxsk56VDQ" / "00001.mp4", number, silent=number == 1)
        if number == 1:
            audio = root / "dev" / "aac" / speaker / "21Uxsk56VDQ" / "00001.m4a"
            audio.parent.mkdir(parents=True)
            write_sound(audio, sound(number))
    (root / "dev" / "aac").mkdir(exist_ok=True)
    write_clip(root / "test" / "mp4" / "id00017" / "01dfn2spqyE" / "00001.mp4", 4)
    damage(write_clip(path.with_name("00002.mp4"), 5))


def grid(root: Path) -> None:
    for number, name in enumerate(
        ("s1/bbaf2n", "s3/lbbc1a", "s4/pgwi9s", "s2/sriz4p", "s20/bwwp3n", "s22/lgak7a", "s5/prav6s")
    ):
        write_clip(root / f"{name}.mpg", number)
        align = root / "alignments" / f"{name}.align"
        align.parent.mkdir(parents=True, exist_ok=True)
        align.write_text("0 23750 sil\n23750 29500 bin\n")
    damage(write_clip(root / "s3" / "swwz9s.mpg", 8))


def crema_d(root: Path) -> None:
    (root / "AudioWAV").mkdir(parents=True)
    for number, name in enumerate(("1001_DFA_ANG_XX", "1002_IEO_NEU_XX", "1003_TIE_HAP_LO", "1004_TAI_SAD_XX")):
        write_clip(root / "VideoFlash" / f"{name}.flv", number)
        write_sound(root / "AudioWAV" / f"{name}.wav", sound(number))
    damage(write_clip(root / "VideoFlash" / "1003_MTI_FEA_XX.flv", 5))


def ravdess(root: Path) -> None:
    for actor in (1, 2, 3, 4):
        for modality, emotion in (("01", "06"), ("02", "06")):
            name = f"{modality}-01-{emotion}-01-02-01-{actor:02d}.mp4"
            write_clip(root / f"Actor_{actor:02d}" / name, actor, silent=modality == "02")
    damage(write_clip(root / "Actor_03" / "01-01-08-01-01-01-03.mp4", 7))


def talker_data(root: Path) -> None:
    """The CSV file and a tar file of sounds and motion codes."""
    rows, files = [], {}
    for number in range(4):
        wav, motion, buffer = f"audio/clip{number}.wav", f"motion/clip{number}.pt", io.BytesIO()
        write_sound(root / "audio.tmp.wav", sound(number))
        files[wav] = (root / "audio.tmp.wav").read_bytes()
        torch.save(torch.randn(FRAMES, 40, generator=torch.Generator().manual_seed(number)), buffer)
        files[motion] = buffer.getvalue()
        rows.append({"motion_pt_path": motion, "wav_path": wav, "text": "set blue by hotel four now"})
    (root / "audio.tmp.wav").unlink()
    files["motion/clip3.pt"] = b"no tensor"
    write_tar(root / "data-000.tar", files)
    with (root / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def emilia(root: Path) -> None:
    files = {}
    for number in range(4):
        name = f"EN_B00000_S0000{number}_W000000"
        facts = {"id": name, "wav": f"{name}.mp3", "text": " Set blue by hotel four now.", "duration": FRAMES / FPS}
        facts |= {"speaker": name[:16], "language": "en", "dnsmos": 3.3}
        files[f"{name}.mp3"] = write_sound(root / "tmp.mp3", sound(number)).read_bytes()
        files[f"{name}.json"] = json.dumps(facts).encode()
    files["EN_B00000_S00000_W000001.mp3"] = files["EN_B00000_S00000_W000000.mp3"]
    files["EN_B00000_S00000_W000001.json"] = b"{"
    (root / "tmp.mp3").unlink()
    (root / "EN").mkdir()
    write_tar(root / "EN" / "EN-B000000.tar", files)


def youtube(root: Path) -> None:
    """Downloaded videos with the lists of AVSpeech, HDTF and TalkVid beside them."""
    ids = ["Tr6MMsoWAog", "zSIcHhxeKbM", "0ABCdefGHij"]
    for number, name in enumerate(ids):
        write_clip(root / "videos" / f"{name}{('.mp4', '.webm', '.mp4')[number]}", number, frames=60)
    shutil.copy(root / "videos" / f"{ids[0]}.mp4", root / "videos" / "Radio1.mp4")
    shutil.copy(root / "videos" / f"{ids[1]}.webm", root / "videos" / "Radio2.webm")
    shutil.copy(root / "videos" / f"{ids[2]}.mp4", root / "videos" / "Radio3.mp4")
    rows = [
        [name, f"{start:.6f}", f"{start + 1.2:.6f}", "0.500000", "0.500000"] for name in ids for start in (0.0, 1.0)
    ]
    rows += [["gone0000000", "1.0", "2.0", "0.5", "0.5"], [ids[0], "5.0", "4.0", "0.5", "0.5"]]
    with (root / "avspeech_train.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    clips = [
        {
            "id": f"videovideo{name}-scene1-scene1", "height": 160, "width": 160, "fps": 25.0, "start-time": 0.1,
            "start-frame": 2, "end-time": 1.5, "end-frame": 37, "durations": "1.4s",
            "info": {"Person ID": str(i), "Video Link": f"{WATCH}{name}", "Language": "English"},
        }
        for i, name in enumerate(ids)
    ]  # fmt: skip
    (root / "talkvid.json").write_text(json.dumps(clips))
    (root / "HDTF_dataset").mkdir()
    for name, text in {
        "RD_video_url.txt": "".join(f"Radio{i} {WATCH}{name}\n" for i, name in enumerate(ids, 1)),
        "RD_annotion_time.txt": "Radio1.mp4 00:00-00:01 00:01-00:02\nRadio2.mp4 00:01-00:02\nRadio3.mp4 00:00-00:02\n",
        "RD_crop_wh.txt": "Radio1_0.mp4 20 120 10 120\nRadio2_0.mp4 20 120 10 120\n",
        "RD_resolution.txt": "Radio1.mp4 160\nRadio2.mp4 160\nRadio3.mp4 160\n",
    }.items():
        (root / "HDTF_dataset" / name).write_text(text)


def own_footage(root: Path) -> None:
    """Any folder with a table; holds the real clip where it is."""
    text = "set blue by hotel four now"
    rows = [{"path": f"clip{i}.mp4", "text": text, "split": "val" * (i == 2), "audio": ""} for i in range(3)]
    for number, row in enumerate(rows):
        write_clip(root / row["path"], number)
    if SAMPLES.is_dir():
        seconds = 1.6  # of five: enough to walk, at 512 pixels
        start = ["-v", "error", "-i", str(SAMPLES / "reference_video.mp4"), "-t", str(seconds)]
        subprocess.run(command(*start, "-c:v", "libx264", "-crf", "18", str(root / "real.mp4")), check=True)
        wave = read_audio(SAMPLES / "reference_audio.wav", RATE)[: round(seconds * RATE)]
        write_wav(root / "real.wav", wave, RATE)
        rows.append({"path": "real.mp4", "text": "", "split": "", "audio": "real.wav"})
    with (root / "clips.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


# By name of the folder below the documentation's /data
TREES: dict[str, Callable[[Path], None]] = {
    "lrs3": lrs3,
    "lrs2": lrs2,
    "vox2": voxceleb2,
    "grid": grid,
    "crema_d": crema_d,
    "ravdess": ravdess,
    "talker_t2av_data": talker_data,
    "emilia": emilia,
    "youtube": youtube,
    "footage": own_footage,
}


def build(name: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    TREES[name](folder)
