"""Texts as bytes and as phonemes, and the training targets that follow from knowing when each phoneme sounds."""

import os
import signal

import numpy as np
import pytest
import torch
from talker_fixtures import tiny_model

from engine.errors import UserError
from talker_t2av.alignment import Alignment, align, token_classes
from talker_t2av.jobs import parts_of_text, slow_seconds
from talker_t2av.losses import training_forward
from talker_t2av.phonemes import SYMBOLS, phonemizer
from talker_t2av.settings import Job
from talker_t2av.text import TalkerTokenizer, byte_tokenizer, phoneme_tokenizer, split_text

WORDS = phoneme_tokenizer("en-us")


@pytest.mark.parametrize(
    ("text", "phonemes"),
    [
        ("set blue by hotel four now", "s 'E t b l 'u: b aI h oU t 'E l f 'o@ n 'aU <.>"),
        ("It costs $3, Dr. Ray?", "I t k 'O2 s t s d '0 l 3 T r 'i: <,> d '0 k t 3 <.> r 'eI <?>"),
        ("naïve; x-ray!", "n aI 'i: v <,> 'E k s r 'eI <!>"),
    ],
)
def test_a_text_has_one_token_per_phoneme_and_pause(text, phonemes):
    tokens = WORDS.tokenizer.convert_ids_to_tokens(WORDS.prompt(text))
    assert tokens == ["<|user|>", *phonemes.split(), "<|assistant|>"]


@pytest.mark.parametrize(("text", "error"), [("say 你好", "你"), (" ?! ", "nothing")])
def test_texts_that_cannot_be_read_are_refused(text, error):
    with pytest.raises(UserError, match=error):
        WORDS.prompt(text)


def test_the_reader_is_started_again_if_it_died_or_the_process_forked():
    read = phonemizer("en-us")
    before = read("again")
    os.kill(read._process.pid, signal.SIGKILL)
    read._process.wait()
    assert read("again") == before
    child = os.fork()
    if child == 0:
        os._exit(0 if read("again") == before else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert read("again") == before


def test_frames_are_aligned_with_the_phonemes_spoken_in_them():
    ids = WORDS.prompt("my map, my map")  # repeated words: only the order tells them apart
    classes = token_classes(WORDS, SYMBOLS)
    said = [0, 0] + [c for token in ids[1:-1] for c in [classes[token]] * 3] + [0]
    said[4:7] = []  # a phoneme too short for its own frame
    tokens = np.zeros((2, len(ids) + 3), int)
    frames = np.zeros((2, len(said) + 4), int)
    tokens[:, : len(ids)] = classes[ids]
    frames[:, : len(said)] = said
    path = align(tokens, np.full(2, len(ids)), frames)
    assert classes[ids[0]] == 0
    assert (np.diff(path) >= 0).all() and (path < len(ids)).all()
    assert (classes[np.array(ids)[path[0]]] == frames[0]).all()
    assert set(path[0, : len(said)].tolist()) >= set(range(len(ids) - 1)) - {1, 2}


def test_the_alignment_loss_is_the_log_attention_on_the_phonemes_of_the_next_patch():
    model = tiny_model()
    torch.manual_seed(0)
    batch = {
        "input_ids": torch.randint(0, 99, (2, 15)),
        "attention_mask": torch.ones(2, 15, dtype=torch.long),
        "speech_span": torch.tensor([[9, 14], [9, 12]]),
        "speech": torch.randn(2, 20, 4),
        "speech_frames": torch.tensor([20, 12]),
        "motion": torch.zeros(2, 0, 5),
        "motion_frames": torch.zeros(2, dtype=torch.long),
        "speaker": torch.randn(2, 256),
        "pointer": (torch.arange(20) // 3).expand(2, -1),
    }
    with Alignment(model, [1]) as alignment:
        forward = training_forward(model, batch)
    loss = alignment.loss(batch, forward.mask, model.config)
    model.llm.config._attn_implementation = "eager"
    seen = model.llm.model(inputs_embeds=forward.embeds, output_attentions=True).attentions[1][:, 0]
    missed = []
    for row, patches in enumerate((5, 3)):
        for patch in range(patches):
            first = 1 + 4 * patch // 3
            last = 1 + (4 * patch + 3) // 3
            missed.append(-seen[row, 9 + patch, first : last + 1].sum().log())
    torch.testing.assert_close(loss, torch.stack(missed).mean())
    assert not model.llm.model.layers[1].self_attn._forward_pre_hooks


def test_any_text_fits_into_bytes(tmp_path):
    words = byte_tokenizer()
    assert words.vocab_size == 262
    ids = words.prompt(" Zebra, wörld! ")
    assert words.tokenizer.decode(ids, skip_special_tokens=True) == "zebra, wörld!" and max(ids) < words.vocab_size
    words.save(tmp_path)
    again = TalkerTokenizer.from_pretrained(tmp_path)
    assert again.prompt("one two") == words.prompt("one two") and again.speech_id == words.speech_id


@pytest.mark.parametrize(
    ("text", "size", "parts"),
    [
        ("One two. ", 9, ["One two. "]),  # short enough: as it is
        ("One two three. Four! Five six seven eight?", 24, ["One two three. Four!", "Five six seven eight?"]),
        ("One, two three, four five six. Seven.", 24, ["One, two three,", "four five six. Seven."]),
        ("one two three four five six", 24, ["one two three four five", "six"]),
        ("一二三。四五六，七八。", 14, ["一二三。", "四五六，", "七八。"]),
        ("a.b 3.5 c\nd e f g h i j k l", 24, ["a.b 3.5 c", "d e f g h i j k l"]),
        ("One two three four five. ... ... ... ?! Six.", 24, ["One two three four five.", "... ... ... ?! Six."]),
        ("One two three four five! ... ... ... ... ... ... ...", 24, ["One two three four five!"]),
        (
            "One two three four five! % & @ $ % & @ $ % & @ $",
            24,
            ["One two three four five!", "% & @ $ % & @ $ % & @ $"],
        ),
    ],
)
def test_long_texts_are_split_where_a_speaker_pauses(text, size, parts):
    assert split_text(text, lambda part: len(part.encode()) <= size) == parts


def test_numbers_are_split_by_the_length_of_their_speech():
    pytest.importorskip("espeakng_loader")
    tokenizer = phoneme_tokenizer("en-us")
    job = Job("tts", "987,654,321,987,654,321 " * 4, "voice.wav")
    parts = parts_of_text(job, tokenizer, 120)
    assert len(job.text) < 120 and len(parts) == 4
    assert all(part == "987,654,321,987,654,321" for part in parts)
    few = parts_of_text(Job("tts", "9,876 " * 8, "voice.wav"), tokenizer, 120)
    assert few == ["9,876 9,876 9,876 9,876"] * 2 and all(20 < slow_seconds(part, tokenizer) <= 30 for part in few)
    assert parts_of_text(Job("tts", "set red now " * 9, "voice.wav"), tokenizer, 120) == ["set red now " * 9]


def test_a_word_that_is_longer_than_a_part_is_named():
    with pytest.raises(UserError, match="xxxxxxxxxx"):
        split_text("so xxxxxxxxxx", lambda part: len(part) <= 8)


def test_a_text_of_too_many_bytes_is_refused():
    with pytest.raises(UserError, match="2,001"):
        Job("t2av", "x" * 2001, "voice.wav", "face.mp4")
