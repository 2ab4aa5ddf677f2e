import os
import subprocess
import sys
from typing import ClassVar

import jiwer
import numpy as np
import pytest

from engine.errors import UserError
from engine.evaluation import measure as measure_module
from engine.evaluation import validation
from engine.evaluation.clips import Clip
from engine.evaluation.measure import measure
from engine.evaluation.validation import figures_of
from engine.media.audio import write_wav
from engine.metrics.metric import Figure, Metric, Take, Waveform
from engine.metrics.phonemes import PhonemeErrors
from engine.metrics.quality import STOI
from engine.metrics.recogniser import Recogniser
from engine.metrics.words import WordErrors
from tests.spoken import speak

GRAMMAR = """#JSGF V1.0;
grammar commands;
public <command> = (bin | lay | place | set) (blue | green | red | white) (at | by | in | with)
  (alpha | bravo | charlie | delta) (zero | one | two | three) (again | now | please | soon);
"""
SENTENCES = ["place red with delta three please", "set white by charlie zero soon", "lay green in bravo two again"]


@pytest.fixture(scope="module")
def spoken():
    """(rate, waves) of the sentences, by espeak-ng's default English voice."""
    utterances = speak([(sentence, "") for sentence in SENTENCES])
    return utterances[0].rate, [utterance.wave for utterance in utterances]


def test_per_is_lowest_for_the_spoken_sentence(spoken):
    pytest.importorskip("pocketsphinx")
    rate, waves = spoken
    metric = PhonemeErrors()
    metric.load()
    rates = np.zeros((3, 3))
    for i, wave in enumerate(waves):
        for j, text in enumerate(SENTENCES):
            errors, count = metric.measure(Take(audio=Waveform(wave, rate)), Take(text=text))["per"]
            rates[i, j] = errors / count
    assert rates.diagonal().max() < 0.7 and (rates.argmin(1) == np.arange(3)).all()
    first = metric.measure(Take(audio=Waveform(waves[0], rate)), Take(text=SENTENCES[0]))["per"]
    assert first[0] / first[1] == rates[0, 0]  # whatever came before
    assert metric.reference("It's x-ray!") == ["IH", "T", "S", "EH", "K", "S", "R", "EY"]
    with pytest.raises(UserError, match="xyzzyx"):
        metric.reference("say xyzzyx")


def test_the_recogniser_does_not_depend_on_earlier_clips(spoken, tmp_path):
    pytest.importorskip("pocketsphinx")
    rate, waves = spoken
    (tmp_path / "grammar.jsgf").write_text(GRAMMAR)
    recogniser = Recogniser(tmp_path / "grammar.jsgf")
    heard = [recogniser.transcribe(wave, rate) for wave in waves]
    assert jiwer.wer(SENTENCES, heard) < 0.1
    assert jiwer.wer(SENTENCES, heard[1:] + heard[:1]) > 0.6  # the wrong clip's words do not fit
    backwards = [recogniser.transcribe(wave, rate) for wave in waves[::-1]]
    assert backwards[::-1] == heard
    assert recogniser.transcribe(np.zeros(8000), rate) == recogniser.transcribe(np.zeros(0), rate) == ""
    (tmp_path / "word.jsgf").write_text(GRAMMAR.replace("green", "grxxn"))
    with pytest.raises(UserError, match="word"):
        Recogniser(tmp_path / "word.jsgf")


def test_sentences_outside_the_grammar_are_recognised_by_the_language_model(spoken, tmp_path):
    pytest.importorskip("pocketsphinx")
    rate, waves = spoken
    (tmp_path / "grammar.jsgf").write_text(GRAMMAR.replace("two | three", "two"))  # the first sentence says three
    metric = WordErrors(f"grammar:{tmp_path}/grammar.jsgf")
    metric.load()
    assert not metric.is_free(SENTENCES[0])  # everything is recognised by the grammar
    assert metric.normalise("Set red - 'in' hotel; don\u2019t.", "en") == "set red in hotel don't"
    words = sorted({word for text in SENTENCES for word in text.split()})
    rows = [f"-1.0 {word} 0.0" for word in ["<s>", "</s>", *words]]
    model = ["\\data\\", f"ngram 1={len(rows)}", "", "\\1-grams:", *rows, "", "\\end\\", ""]
    (tmp_path / "free.arpa").write_text("\n".join(model))
    metric.load()
    assert [metric.is_free(text) for text in SENTENCES] == [True, False, False]
    heard = [metric.transcribe(Take(Waveform(wave, rate), text=text)) for text, wave in zip(SENTENCES, waves)]
    assert "three" in heard[0] and jiwer.wer(SENTENCES[:1], heard[:1]) < 0.5
    assert jiwer.wer(SENTENCES[1:], heard[1:]) < 0.1


@pytest.mark.slow
def test_processes_that_start_together_do_not_corrupt_the_numba_cache(tmp_path):
    """Without a lock one compiles what another has half compiled, and the mixture ends every later process."""
    pytest.importorskip("librosa")
    call = "import time; time.sleep({}); import numpy; from engine.metrics.speech import pitch"
    call += "; print(len(pitch(numpy.sin(numpy.arange(12_000) / 20), 12_000)))"
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    for delays in ((0, 0.4), (0,)):  # compiled, then from the cache
        processes = [
            subprocess.Popen([sys.executable, "-c", call.format(delay)], env=environment, stdout=subprocess.PIPE)
            for delay in delays
        ]
        assert [(p.communicate()[0], p.returncode) for p in processes] == [(b"63\n", 0)] * len(delays)


def test_a_validation_averages_a_figure_over_the_clips_that_have_it(monkeypatch):
    """Free sentences have an error rate of their own, and may come first."""

    class Words(Metric):
        figures: ClassVar = {"wer": Figure("WER", -1), "wer_free": Figure("free", -1)}

        def measure(self, take, truth):
            return {"wer" if take.text == "closed" else "wer_free": (1, 4)}

    monkeypatch.setattr(validation, "metrics_of", lambda figures: {Words: list(figures)})
    names = ["wer", "wer_free"]
    texts = ["free", "closed", "free"]
    found = validation.measure_outputs(names, texts, [np.zeros(240)] * 3, None, 24_000)
    assert figures_of([found]) == {"wer": 0.25, "wer_free": 0.25}


def test_a_validation_equals_an_evaluation_of_the_same_clips(tmp_path):
    """The same clips as files of an evaluation and as waves of a validation: the same measurements."""
    pytest.importorskip("pystoi")
    rng = np.random.default_rng(0)
    rate = 16_000
    true = [rng.normal(0, 0.1, rate).astype(np.float32) for _ in range(2)]
    noisy = [wave + rng.normal(0, 0.1, rate).astype(np.float32) for wave in true]
    clips = []
    for i, waves in enumerate(zip(true, noisy)):
        takes = [tmp_path / f"{i}_{name}.wav" for name in ("true", "noisy")]
        for path, wave in zip(takes, waves):
            write_wav(path, wave, rate, lossless=True)
        clips.append(Clip(str(i), None, Take(takes[0]), {"noisy": Take(takes[1])}))
    rows = measure(clips, [STOI()], cache=tmp_path / "cache").rows["STOI"]["noisy"]
    found = validation.measure_outputs(["stoi"], ["", ""], noisy, true, rate)["stoi"]
    assert {str(number): pair[0] for number, pair in found.values.items()} == pytest.approx(
        {clip: row["stoi"][0] for clip, row in rows.items()}, abs=1e-4
    )
    assert not measure_module._loaded  # no network stays in the memory of a training
