"""TensorBoard and Weights & Biases get the metrics of a run and the media of its validations."""

import numpy as np
import pytest
import torch
from toy_task import CONFIG, ToyGAN, ToySet, read_lines

from engine.media.audio import write_wav
from engine.media.video import write_video
from engine.training.settings import TrainerConfig
from engine.training.trainer import Trainer


def tone(hertz: float) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(12_000) / 24_000)


class Showing(ToyGAN):
    def measure(self, folder, share):
        write_wav(folder / "seen" / "a.wav", tone(440), 24_000)
        write_video(folder / "b.mp4", np.full((10, 32, 48, 3), 90, np.uint8), 25)
        (folder / "notes.txt").write_text("nothing to show")
        return super().measure(folder, share)


def train(run, steps=7, **changes):
    torch.manual_seed(0)
    config = TrainerConfig(**CONFIG | {"steps": steps, "checkpoint_every": 5} | changes)
    trainer = Trainer(Showing(), ToySet(), config, run)
    trainer.fit()


def test_tensorboard_has_metrics_audio_spectrograms_and_videos(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path / "run", tensorboard=True)
    train(tmp_path / "run", steps=9, tensorboard=True)  # continues, in a second event file
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"images": 0, "audio": 0, "scalars": 0})
    events.Reload()
    rows = read_lines(tmp_path / "run" / "log.jsonl")
    losses = {row["step"]: row["generator/loss"] for row in rows if "generator/loss" in row}
    found = {event.step: event.value for event in events.Scalars("generator/loss")}
    assert found == pytest.approx(losses) and sorted(found) == list(range(1, 10))
    assert {event.step for event in events.Scalars("validation/weight")} == {7, 9}
    (sound, _) = events.Audio("validation/seen/a/sound")
    assert sound.sample_rate == 24_000 and sound.step == 7 and sound.length_frames == 12_000
    tags = set(events.Tags()["images"])
    assert tags == {"validation/seen/a/spectrogram", "validation/b/video"}
    video = events.Images("validation/b/video")[0]
    assert video.encoded_image_string[:4] == b"GIF8" and (video.width, video.height) == (48, 32)
    assert (tmp_path / "run" / "validation" / "step-00000007" / "notes.txt").is_file()


def test_wandb_logs_metrics_and_media_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.sdk.wandb_run.Run
    logged = []
    log = run.log
    monkeypatch.setattr(run, "log", lambda self, data: (logged.append((data["step"], data)), log(self, data)))
    train(tmp_path / "a run", wandb="offline")
    names = {name: type(value).__name__ for _, data in logged for name, value in data.items()}
    assert names["validation/seen/a/sound"] == "Audio" and names["validation/b/video"] == "Video"
    assert names["validation/seen/a/spectrogram"] == "Image"
    assert {step for step, data in logged if "generator/loss" in data} == set(range(1, 8))
    (offline,) = (tmp_path / "a run" / "wandb").glob("offline-run-*")
    assert {path.suffix for path in (offline / "files" / "media").rglob("*.*")} == {".wav", ".png", ".mp4"}
