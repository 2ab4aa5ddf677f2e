"""Metrics of voices, prosody, utterance endings and synchrony on constructed cases."""

import numpy as np
import pytest

from engine.media.audio import loudness
from engine.metrics.metric import Take, Waveform
from engine.metrics.registry import metric_of
from engine.metrics.speaker import OwnVoice, nearest
from engine.metrics.speech import Endings, PitchContour, Prosody, spans_around_change, speech_end, synchrony
from engine.metrics.words import WordErrors

RATE = 24_000
A, B, C = np.eye(3, 256).tolist()


def hum(*spans: tuple[float, float], seconds: float) -> np.ndarray:
    """A tone in the given spans of seconds, room tone elsewhere."""
    t = np.arange(round(seconds * RATE)) / RATE
    on = sum((t >= a) & (t < b) for a, b in spans)
    noise = 1e-3 * np.random.default_rng(0).standard_normal(len(t))
    return (0.3 * np.sin(2 * np.pi * 220 * t) * on + noise).astype("f4")


def voices(true, made, speakers):
    """`own_voice_first` of made vectors, among the voices of the true ones."""
    truths = {str(i): Take(speaker=speaker) for i, speaker in enumerate(speakers)}
    rows, true = ({str(i): {"vector": v} for i, v in enumerate(vectors)} for vectors in (made, true))
    found = OwnVoice("clips").finish(rows, true, truths).values()
    return [
        (row["own_voice_first"][0], round(row["voice_similarity"][0], 5)) if len(row) > 1 else None for row in found
    ]


def test_a_voice_is_compared_with_other_clips_of_its_speaker():
    assert voices([A, A, B, C], [A, B, B, C], "1123") == [(1, 1), (0, 0), None, None]
    assert voices([A, A, B, B], [A, B, B, [0] * 256], "1122") == [(1, 1), (0, 0), (1, 1), (0, 0)]  # silence is nobody's
    assert voices([A, B], [A, B], "12") == [None, None]
    assert voices([A, A, B], [A, A, B], [None, None, "1"]) == [None, None, None]  # unknown speakers


def test_enrolled_voices_need_no_other_clip():
    known = {name: {"other": np.array(vector)} for name, vector in zip("123", (A, B, C))}
    truths = {name: Take(speaker=name) for name in "124"}
    found = nearest({"1": {"vector": A}, "2": {"vector": A}, "4": {"vector": A}}, truths, known)
    assert found["1"]["own_voice_first"] == (1, 1) and found["2"]["own_voice_first"] == (0, 1) and "4" not in found


def test_prosody_changes_in_the_direction_of_the_reference():
    def row(first, second):
        return {"whole": first, "around_change": [first, second]}

    flat, lively = (1.0, -30.0), (5.0, -20.0)
    truths = {
        name: Take(about={"expressions": names})
        for name, names in {"a": ["sad", "sad", "happy"], "b": ["happy", "sad"], "c": ["sad"]}.items()
    }
    true = {"a": row(flat, lively), "b": row(lively, flat), "c": {"whole": flat, "around_change": []}}
    made = {"a": row(flat, lively), "b": row(flat, lively), "c": {"whole": lively, "around_change": []}}
    found = Prosody().finish(made, true, truths)
    assert [found[name].get("energy_right_way") for name in "abc"] == [(1, 1), (0, 1), None]
    assert found["c"]["pitch_range_correlation"] == (1.0, 5.0)
    assert found["b"]["energy_correlation"] == (-20.0, -30.0)
    short = {"a": row(flat, (0.0, float("nan"))), "b": row(flat, lively)}  # the first ends before the change
    found = Prosody().finish(short, {"a": true["a"]}, truths)
    assert not [name for name in found["a"] if name.endswith("right_way")]
    assert found["b"]["energy_right_way"] == (0, 1)
    phonemes = [["a", 0.1, 0.5], ["b", 0.5, 0.9], ["c", 1.0, 1.4]]
    assert spans_around_change({"phonemes": phonemes, "change": 1.0}) == [(0.1, 0.9), (1.0, 1.4)]


def test_pitch_contours_are_compared_where_both_are_voiced():
    pytest.importorskip("librosa")
    time = np.arange(RATE) / RATE

    def tone(factor):
        phase = 2 * np.pi * factor * (150 * time + 30 * time**2)  # from 150 to 210 Hz
        return Take(Waveform(0.1 * sum(np.sin(k * phase) / k for k in range(1, 6)), RATE))

    metric = PitchContour()
    metric.load()
    row = metric.measure(tone(1.2), tone(1.0))
    assert row["f0_correlation"][0] > 0.98
    assert row["log_f0_rmse"][0] == pytest.approx(np.log(1.2), abs=0.02)


def test_prosody_is_measured_before_and_after_a_change():
    pytest.importorskip("librosa")
    time = np.arange(RATE) / RATE
    parts = [level * sum(np.sin(2 * np.pi * 150 * k * time) / k for k in range(1, 6)) for level in (0.01, 0.1)]
    truth = Take(about={"change": 1.0, "phonemes": [["a", 0.0, 0.9], ["b", 1.0, 1.9]], "expressions": ["sad", "happy"]})
    row = Prosody().measure(Take(Waveform(np.concatenate(parts), RATE)), truth)
    (_, before), (_, after) = row["around_change"]
    assert after - before == pytest.approx(20, abs=0.5)  # dB


@pytest.mark.parametrize(
    ("silence", "stopped", "figure"),
    [(0.15, True, "ends_in_time"), (0.5, True, "ends_late"), (0.0, True, "ends_cut"), (0.2, False, "runs_away")],
)
def test_endings_are_in_time_late_cut_off_or_missing(silence, stopped, figure):
    take = Take(Waveform(hum((0.1, 1.0), seconds=1.0 + silence), RATE), about={"stopped": stopped})
    row = Endings().measure(take, Take(Waveform(hum(seconds=1.5), RATE)))
    assert {name for name, (a, _) in row.items() if a == 1} == {figure}
    assert row["length_error"][0] == pytest.approx(0.5 - silence, abs=1e-3)


def test_speech_ends_where_its_energy_does():
    assert speech_end(hum((0.2, 0.5), (0.8, 1.23), seconds=1.5), RATE) == pytest.approx(1.23, abs=0.011)
    assert speech_end(hum((0.2, 1.0), seconds=1.0), RATE) == pytest.approx(1.0)
    assert speech_end(np.zeros(RATE), RATE) == 0


def test_synchrony_finds_the_shift():
    wave = hum((0.2, 0.4), (0.8, 0.9), (1.3, 1.7), seconds=2.4)
    mouth = loudness(wave, RATE)
    assert synchrony(mouth, wave, RATE) == pytest.approx(1)
    for shift in (-5, 5):  # the mouth 200 ms ahead of the audio, and behind it
        moved = np.roll(mouth, shift)
        assert synchrony(moved, wave, RATE, shift) > 0.99 > 0.5 > synchrony(moved, wave, RATE)
    assert synchrony(np.zeros(60), wave, RATE) == 0


def test_shuffled_transcripts_are_a_control():
    def row(figure, text):
        return {figure: (0, 2), "text": text, "words": text, "heard": text}

    rows = {"a": row("wer", "set red"), "b": row("wer_free", "my hotel"), "c": row("wer", "lay blue")}
    found = WordErrors("grammar").finish(rows, {}, {})
    assert found["a"]["wer_shuffled"] == found["c"]["wer_shuffled"] == (2, 2)
    assert "wer_free_shuffled" not in found["b"]  # the only one of its kind


@pytest.mark.parametrize(
    ("figure", "given", "applies"), [("wer", "audio", False), ("wer", None, True), ("fid", "video", False)]
)
def test_a_stream_that_is_an_input_is_not_measured(figure, given, applies):
    assert metric_of(figure)().applies(Take(given=given)) == applies
