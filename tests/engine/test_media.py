import subprocess

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from engine.errors import UserError
from engine.files import atomic_output
from engine.media import audio
from engine.media.audio import generated_comment, read_audio, write_wav
from engine.media.ffmpeg import command, probe
from engine.media.video import iter_video, join_audio, mux_audio, read_video, write_video
from tests.media_files import comment_of, ffmpeg

RATE = 24_000


def counting_frames(count, height=64, width=96):
    """Frame i has a grey level of 16 + 4 i on its left half, and 200 in its top right quarter."""
    frames = np.full((count, height, width, 3), 100, np.uint8)
    frames[:, :, : width // 2] = (16 + 4 * np.arange(count))[:, None, None, None]
    frames[:, : height // 2, width // 2 :] = 200
    return frames


def numbers(frames):
    """The frame numbers that `counting_frames` painted."""
    return np.round((frames[:, 8:-8, 8:32].mean((1, 2, 3)) - 16) / 4).astype(int)


def tone(seconds, hz=440.0, rate=RATE):
    return (0.4 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("media") / "clip.mp4"
    write_video(path, counting_frames(30), 25, tone(1.2), RATE)
    return path


def test_written_video_and_audio_read_back_in_sync(clip):
    frames = read_video(clip)
    assert frames.shape == (30, 64, 96, 3) and frames.dtype == np.uint8
    assert np.abs(frames.astype(int) - counting_frames(30)).mean() < 3
    assert numbers(frames).tolist() == list(range(30))
    wave = read_audio(clip, RATE)
    assert wave.dtype == np.float32 and abs(len(wave) - 1.2 * RATE) < 1100  # AAC frames hold 1024 samples
    assert np.abs(wave[2000:26000] - tone(1.2)[2000:26000]).max() < 0.02  # in time to the sample


def test_blocks_concatenate_to_the_whole_video(clip):
    blocks = list(iter_video(clip, block=7))
    assert [len(block) for block in blocks] == [7, 7, 7, 7, 2]
    assert np.array_equal(np.concatenate(blocks), read_video(clip))
    stream = iter_video(clip, block=7)
    next(stream)
    stream.close()  # stopping early leaves no process behind


@pytest.mark.parametrize(("fps", "expected"), [(50.0, 60), (12.5, 15), (30000 / 1001, 36)])
def test_frame_rate_is_changed_by_time_stamps(clip, fps, expected):
    found = numbers(read_video(clip, fps))
    assert len(found) == expected
    assert np.abs(found - np.arange(expected) * 25 / fps).max() <= 1


FORMATS = {  # name: (options of ffmpeg, file name)
    "60 frames a second": (("-r", 60), "a.mp4"),
    "webm": (("-c:v", "libvpx-vp9", "-deadline", "realtime"), "a.webm"),
    "avi": (("-c:v", "mpeg4", "-q:v", 3), "a.avi"),
    "gif": (("-r", 10), "a.gif"),
    "mov of an editor": (("-c:v", "prores_ks"), "a.mov"),
    "interlaced": (
        ("-vf", "fps=50,tinterlace=interleave_top,fieldorder=tff", "-flags", "+ilme+ildct", "-c:v", "mpeg2video"),
        "a.mpg",
    ),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_container_keeps_frames_and_their_times(tmp_path, clip, kind):
    options, name = FORMATS[kind]
    ffmpeg("-i", clip, "-an", *options, tmp_path / name)
    found = numbers(read_video(tmp_path / name, 25))
    if kind == "gif":  # ffmpeg writes frames of a low rate up to two of them late
        assert 29 <= len(found) <= 35 and np.abs(found - np.arange(len(found)).clip(max=29)).max() <= 6
    else:
        assert found.tolist() == list(range(30))


def test_cover_art_is_not_read_as_video(tmp_path, clip, wrong):
    inputs = ("-i", clip, "-i", wrong / "picture.png", "-map", 0, "-map", 1)
    ffmpeg(*inputs, "-c", "copy", "-disposition:v:1", "attached_pic", tmp_path / "cover.mp4")
    assert numbers(read_video(tmp_path / "cover.mp4")).tolist() == list(range(30))


def test_variable_frame_rate_becomes_constant(tmp_path):
    # Ten frames at 25 fps, then ten at 12.5 fps.
    write_video(tmp_path / "a.mp4", counting_frames(20), 25)
    times = "setpts='if(lt(N,10),N,10+2*(N-10))/25/TB'"
    ffmpeg("-i", tmp_path / "a.mp4", "-vf", times, "-fps_mode", "vfr", "-crf", 10, tmp_path / "vfr.mp4")
    found = numbers(read_video(tmp_path / "vfr.mp4"))
    assert found[:10].tolist() == list(range(10))
    assert found[10:29:2].tolist() == list(range(10, 20))


def test_video_that_starts_late_stays_in_sync_with_the_audio(tmp_path, clip):
    late = tmp_path / "late.mkv"
    ffmpeg("-itsoffset", 0.4, "-i", clip, "-i", clip, "-map", "0:v", "-map", "1:a", "-c", "copy", late)
    found = numbers(read_video(late))
    assert found[:10].tolist() == [0] * 10
    assert found[10:].tolist() == list(range(30))


def test_frames_have_even_sides_square_pixels_and_a_limited_size(tmp_path, clip):
    write_video(tmp_path / "odd.mp4", counting_frames(5, 63, 97), 25)
    frames = read_video(tmp_path / "odd.mp4")
    assert frames.shape == (5, 64, 98, 3)  # 4:2:0 needs even sides: the last pixel is repeated
    assert np.abs(frames[:, -1].astype(int) - frames[:, -2]).mean() < 3
    assert read_video(tmp_path / "odd.mp4", max_side=48).shape == (5, 31, 48, 3)
    assert read_video(tmp_path / "odd.mp4", max_side=500).shape == frames.shape
    ffmpeg("-i", clip, "-vf", "setsar=2", "-frames:v", 3, tmp_path / "wide.mp4")  # pixels that are not square
    assert read_video(tmp_path / "wide.mp4").shape == (3, 64, 192, 3)


def test_encoding_is_reproducible_for_arrays_and_iterators(tmp_path, clip):
    for name, frames in (("again.mp4", counting_frames(30)), ("streamed.mp4", (f for f in counting_frames(30)))):
        write_video(tmp_path / name, frames, 25, tone(1.2), RATE)
        assert (tmp_path / name).read_bytes() == clip.read_bytes()


def test_muxing_audio_copies_h264_and_encodes_other_codecs(tmp_path, clip):
    wave = tone(1.2, 880)
    mux_audio(clip, wave, RATE, tmp_path / "new.mp4")
    assert np.array_equal(read_video(tmp_path / "new.mp4"), read_video(clip))
    assert probe(tmp_path / "new.mp4").video == "h264" and probe(tmp_path / "new.mp4").audio == "aac"
    assert np.abs(read_audio(tmp_path / "new.mp4", RATE)[2000:26000] - wave[2000:26000]).max() < 0.02
    ffmpeg("-i", clip, "-c:v", "mpeg4", "-q:v", 2, "-vf", "crop=95:63:0:0", "-an", tmp_path / "old.avi")
    mux_audio(tmp_path / "old.avi", wave, RATE, tmp_path / "old.mp4")
    assert probe(tmp_path / "old.mp4").video == "h264" and len(read_video(tmp_path / "old.mp4")) == 30
    mux_audio(tmp_path / "new.mp4", wave, RATE, tmp_path / "new.mp4")  # in place


def test_long_audio_is_written_and_drawn_in_blocks(tmp_path, monkeypatch):
    wave = 0.3 * np.sin(np.arange(5_000) ** 1.2 / 7).astype(np.float32)
    whole = audio.mel_picture(wave, 16_000)
    mel = torchaudio.transforms.MelSpectrogram(16_000, n_fft=1024, hop_length=160, n_mels=80)
    expected = mel(torch.from_numpy(wave))
    np.testing.assert_allclose(whole, 10 * torch.log10(expected.clamp(min=1e-8)).numpy(), atol=1e-3)
    write_wav(tmp_path / "whole.wav", wave, 16_000)
    monkeypatch.setattr(audio, "BLOCK", 999)
    monkeypatch.setattr(audio, "PICTURE_FRAMES", 7)
    np.testing.assert_allclose(audio.mel_picture(wave, 16_000), whole, atol=1e-3)
    write_wav(tmp_path / "parts.wav", wave, 16_000)
    assert (tmp_path / "parts.wav").read_bytes() == (tmp_path / "whole.wav").read_bytes()
    with pytest.raises(UserError, match="not finite"):  # in the last part
        write_wav(tmp_path / "parts.wav", np.append(wave, np.nan), 16_000)


def test_wav_is_clipped_and_stereo_is_averaged(tmp_path):
    wave = tone(0.5)
    write_wav(tmp_path / "a.wav", torch.from_numpy(wave), RATE)
    assert soundfile.info(tmp_path / "a.wav").subtype == "PCM_16"
    assert np.abs(read_audio(tmp_path / "a.wav", RATE) - wave).max() < 1e-4
    assert np.abs(read_audio(tmp_path / "a.wav", 16_000) - tone(0.5, rate=16_000))[200:-200].max() < 2e-3
    write_wav(tmp_path / "loud.wav", 3 * wave, RATE)
    loud = read_audio(tmp_path / "loud.wav", RATE)
    assert 0.99 < loud.max() <= 1.0 and loud.min() >= -1.0  # clipped, not wrapped around
    stereo = np.stack([wave, np.zeros_like(wave)], 1)
    soundfile.write(tmp_path / "stereo.flac", stereo, RATE)
    assert np.abs(read_audio(tmp_path / "stereo.flac", RATE) - wave / 2).max() < 1e-3
    ffmpeg("-i", tmp_path / "stereo.flac", "-c:a", "alac", tmp_path / "stereo.m4a")  # which ffmpeg decodes
    assert np.abs(read_audio(tmp_path / "stereo.m4a", RATE) - wave / 2).max() < 1e-3


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    write_wav(folder / "sound.wav", tone(0.2), RATE)
    write_video(folder / "silent.mp4", counting_frames(5), 25)
    whole = (folder / "silent.mp4").read_bytes()
    (folder / "headless.mp4").write_bytes(whole[: whole.index(b"mdat") + 40])  # index in front, pictures cut off
    ffmpeg("-f", "lavfi", "-i", "color=red:s=32x32", "-frames:v", 1, folder / "picture.png")
    ffmpeg("-i", folder / "sound.wav", "-i", folder / "picture.png", "-map", 0, "-map", 1, folder / "cover.mp3")
    return folder


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (read_video, "picture.png"),
        (read_video, "sound.wav"),
        (read_video, "cover.mp3"),
        (read_video, "headless.mp4"),
        (lambda path: read_audio(path, RATE), "silent.mp4"),
    ],
)
def test_a_file_without_the_stream_is_refused(wrong, read, name):
    with pytest.raises(UserError, match=f"^.*{wrong / name}.*$"):
        read(wrong / name)


def test_a_failed_write_keeps_the_old_file(tmp_path):
    write_video(tmp_path / "x.mp4", counting_frames(3), 25)
    before = (tmp_path / "x.mp4").read_bytes()

    def breaking():
        yield from counting_frames(2)
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        write_video(tmp_path / "x.mp4", breaking(), 25)
    with pytest.raises(UserError, match="No space left"), atomic_output(tmp_path / "x.mp4"):
        raise OSError(28, "No space left on device")
    assert (tmp_path / "x.mp4").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4"]


def test_file_names_may_look_like_options_or_urls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("-y.mp4", "http:x.mp4", "a b%03d.mp4"):
        write_video(name, counting_frames(3), 25, tone(0.12), RATE)
        assert len(read_video(name)) == 3
        mux_audio(name, tone(0.12), RATE, name)
        assert len(read_audio(name, RATE)) > 0


def test_an_mp3_with_a_wrong_frame_count_is_read_to_its_end(tmp_path):
    """As a pipe writes it, without the header that would tell its length."""
    noise = (np.random.default_rng(0).standard_normal(49_920) * 3000).astype("<i2").tobytes()
    raw = ["-f", "s16le", "-ar", "24000", "-ac", "1", "-i", "pipe:0", "-c:a", "libmp3lame", "-f", "mp3", "pipe:1"]
    call = [word for word in command("-v", "error", *raw) if word != "-nostdin"]
    done = subprocess.run(call, input=noise, capture_output=True)
    (tmp_path / "x.mp3").write_bytes(done.stdout)
    with soundfile.SoundFile(tmp_path / "x.mp3") as file:
        held = len(file.read(2**20))
        assert held < file.frames
    assert len(read_audio(tmp_path / "x.mp3", 24_000)) == held


def test_generated_files_are_marked_in_their_comment(tmp_path):
    comment = generated_comment("HiCoDiT", "speech")
    wave = tone(1.0)
    write_wav(tmp_path / "speech.wav", wave, RATE, comment=comment)
    write_wav(tmp_path / "recorded.wav", wave, RATE)
    write_video(tmp_path / "clip.mp4", counting_frames(25), 25, wave, RATE, comment=comment)
    write_video(tmp_path / "filmed.mp4", counting_frames(25), 25)
    mux_audio(tmp_path / "filmed.mp4", wave, RATE, tmp_path / "dubbed.mp4", comment)
    join_audio(tmp_path / "filmed.mp4", tmp_path / "recorded.wav", tmp_path / "joined.mp4", comment)
    for name in ("speech.wav", "clip.mp4", "dubbed.mp4", "joined.mp4"):
        assert comment_of(tmp_path / name) == comment, name
    assert comment_of(tmp_path / "recorded.wav") is comment_of(tmp_path / "filmed.mp4") is None
    with soundfile.SoundFile(tmp_path / "speech.wav") as file:
        assert file.comment == comment
