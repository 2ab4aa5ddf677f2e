"""The tokenizer that is made here."""

import pytest

from engine.errors import UserError
from talker_t2av.text import SPEECH, TalkerTokenizer, byte_tokenizer

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


def test_placeholders_are_one_span_and_control_tokens_are_refused():
    words = byte_tokenizer(WORDS)
    ids, (start, end) = words.sequence(WORDS[0], patches=5)
    assert ids[start:end] == [words.speech_id] * 5 and ids[:start] == words.prompt(WORDS[0]) and ids[end:] == words.tail
    with pytest.raises(UserError, match="control token"):
        words.prompt(f"one {SPEECH} two")
