"""The tokenizer that is made here."""

import pytest

from engine.errors import UserError
from talker_t2av.settings import Job
from talker_t2av.text import TalkerTokenizer, byte_tokenizer, split_text

WORDS = ["bin blue at alpha one now", "lay green by bravo two soon", "set red in alpha two please"]


def test_words_of_its_texts_become_single_tokens_and_any_other_text_still_fits(tmp_path):
    bytes_only, learned = byte_tokenizer(), byte_tokenizer(WORDS * 3)
    extra = len(learned.prompt(""))  # control tokens
    assert len(learned.prompt(WORDS[0])) == 6 + extra < len(bytes_only.prompt(WORDS[0]))
    assert bytes_only.vocab_size == 262 < learned.vocab_size
    odd = "zebra, wörld!"
    ids = learned.prompt(odd)
    assert learned.tokenizer.decode(ids, skip_special_tokens=True) == odd
    assert max(ids) < learned.vocab_size
    learned.save(tmp_path)
    again = TalkerTokenizer.from_pretrained(tmp_path)
    assert again.prompt(WORDS[1]) == learned.prompt(WORDS[1]) and again.speech_id == learned.speech_id


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
    with pytest.raises(UserError, match=r"'xxxxxxxxxx'\.\.\. has neither space nor stop in 8 bytes"):
        split_text("so xxxxxxxxxx", 8)
    with pytest.raises(UserError, match="the text has 2,001 bytes, and 2,000 is the most: make several jobs"):
        Job("tts", "x" * 2001, "voice.wav")
