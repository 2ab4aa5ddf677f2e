"""The tokenizer that is made here."""

import pytest

from engine.errors import UserError
from talker_t2av.settings import Job
from talker_t2av.text import TalkerTokenizer, byte_tokenizer, split_text


def test_any_text_fits_into_bytes(tmp_path):
    words = byte_tokenizer()
    assert words.vocab_size == 262
    ids = words.prompt(" Zebra, wörld! ")
    assert words.tokenizer.decode(ids, skip_special_tokens=True) == "zebra, wörld!" and max(ids) < words.vocab_size
    words.save(tmp_path)
    again = TalkerTokenizer.from_pretrained(tmp_path)
    assert again.prompt("one two") == words.prompt("one two") and again.speech_id == words.speech_id


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One two. ", ["One two. "]),  # short enough: as it is
        ("One two three. Four! Five six seven eight?", ["One two three. Four!", "Five six seven eight?"]),
        ("One, two three, four five six. Seven.", ["One, two three,", "four five six. Seven."]),
        ("one two three four five six", ["one two three four five", "six"]),
        ("一二三。四五六，七八。", ["一二三。", "四五六，", "七八。"]),
        ("a.b 3.5 c\nd e f g h i j k l", ["a.b 3.5 c", "d e f g h i j k l"]),
    ],
)
def test_long_texts_are_split_where_a_speaker_pauses(text, parts):
    assert split_text(text, {"One two. ": 9, "一二三。四五六，七八。": 14}.get(text, 24)) == parts


def test_a_word_that_is_longer_than_a_part_is_named():
    with pytest.raises(UserError, match=r"'xxxxxxxxxx'\.\.\. has neither space nor punctuation within 8 bytes"):
        split_text("so xxxxxxxxxx", 8)
    with pytest.raises(UserError, match="the text has 2,001 bytes, at most 2,000 are supported: split it"):
        Job("t2av", "x" * 2001, "voice.wav", "face.mp4")
