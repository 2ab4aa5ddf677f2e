"""The recogniser of GRID's sentences: its sums over sentences, and word errors by it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.errors import UserError
from engine.evaluation.validation import words_by
from engine.metrics.grid_recogniser import (
    NEVER,
    PLACES,
    WORDS,
    GridRecogniser,
    GridRecogniserConfig,
    is_sentence,
    sentence_scores,
    sentences,
    word_numbers,
)
from engine.metrics.metric import Take, Waveform
from engine.metrics.words import WordErrors

TEXTS = ["bin blue at f two now", "set white with z zero soon"]


@pytest.fixture
def scores():
    return torch.randn(2, 9, 1 + len(WORDS), generator=torch.Generator().manual_seed(0)).log_softmax(-1)


def test_the_score_of_a_sentence_is_its_ctc_log_likelihood(scores):
    numbers = torch.tensor([word_numbers(text) for text in TEXTS])
    entry = torch.full((2, len(WORDS)), NEVER).scatter(1, numbers - 1, 0.0)
    ctc = F.ctc_loss(scores.transpose(0, 1), numbers, torch.tensor([9, 9]), torch.tensor([6, 6]), reduction="none")
    torch.testing.assert_close(sentence_scores(scores, entry), -ctc)


def test_the_sum_over_sentences_is_the_sum_over_the_words_of_one_slot(scores):
    letters = []
    for letter in PLACES[3]:
        entry = torch.zeros(2, len(WORDS))
        others = [WORDS.index(other) for other in PLACES[3] if other != letter]
        entry[:, others] = NEVER
        letters.append(sentence_scores(scores, entry))
    torch.testing.assert_close(torch.stack(letters).logsumexp(0), sentence_scores(scores))


def test_decoding_chooses_the_most_likely_word_of_each_slot():
    scores = torch.full((1, 20, 1 + len(WORDS)), -8.0)
    scores[..., 0] = -0.1
    for place, number in enumerate(word_numbers(TEXTS[0])):
        scores[0, 3 * place + 1, number] = 0
    scores[0, 4, word_numbers("bin red at f two now")[1]] = -1  # a weaker rival
    assert sentences(scores) == [TEXTS[0]]
    scores[0, 5, word_numbers("bin red at f two now")[1]] = 5  # the rival in the next frame
    assert sentences(scores) == ["bin red at f two now"]


def test_word_errors_by_a_released_recogniser(tmp_path, monkeypatch):
    torch.manual_seed(0)
    network = GridRecogniser(GridRecogniserConfig(channels=8, hidden=8)).eval()
    network.save_pretrained(tmp_path / "judge", "card")
    metric = WordErrors(words_by(tmp_path / "judge")["wer"])
    metric.check()
    metric.load()
    wave = 0.1 * np.random.default_rng(0).standard_normal(24_000).astype(np.float32)
    heard = metric.closed.transcribe(wave, 24_000)
    assert is_sentence(heard) and is_sentence(metric.closed.transcribe(np.zeros(10, np.float32), 16_000))

    monkeypatch.setattr(metric.closed, "transcribe", lambda wave, rate: "bin blue at g two soon")
    found = metric.measure(Take(Waveform(wave, 24_000)), Take(text="Bin blue at F two now"))
    assert found["wer"] == (2, 6) and found["letter_errors"] == (1, 1)
    with pytest.raises(UserError, match="hello"):
        metric.measure(Take(Waveform(wave, 24_000)), Take(text="hello"))
