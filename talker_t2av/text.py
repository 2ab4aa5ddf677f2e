"""Text to tokens of the language model: a chat of two turns, where the assistant's turn contains placeholders for
patches.

All tokenizers share one class. Qwen3's tokenizer is loaded from the released checkpoint. Those of small models are
created here, based on phonemes (`phoneme_tokenizer`) or bytes (`byte_tokenizer`), in the same file format with a
shorter chat template.

Axes: none; token ids are lists.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from engine.errors import UserError
from engine.hub import release_folder
from engine.untrusted import read_yaml
from talker_t2av.phonemes import LANGUAGES, phonemizer

SPEECH = "<SPEECH_FRAME>"
MOTION = "<MOTION_FRAME>"  # part of the released vocabulary, but unused
BYTE_TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|end|>"
MARK = "the words that are said"  # placeholder of the text in a rendered chat
# Split positions after a sentence, a clause and a word.
SENTENCE = r"(?<=[.!?…]\s)|(?<=[。！？\n])"
CLAUSE = r"(?<=[,;:]\s)|(?<=[，、；：])"
WORD = r"(?<=\s)"
RENDER_SECONDS = 20
RENDER = """
import json, resource, sys
from jinja2.sandbox import ImmutableSandboxedEnvironment
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
template, known = json.load(sys.stdin)
environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
environment.add_extension("jinja2.ext.loopcontrols")
environment.filters["tojson"] = json.dumps
sys.stdout.write(environment.from_string(template).render(**known))
"""  # as in transformers
BYTE_SPECIALS = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")


class TalkerTokenizer:
    """Hugging Face tokenizer with a chat template and two frame tokens, which are added if they are missing.

    Attributes:
        speech_id: placeholder token of a patch.
        pad_id: padding token.
        vocab_size: vocabulary size; the embedding table must have at least as many rows.
        tail: tokens after the placeholders.
        language: language of the phonemes to which texts are converted. None: text is tokenized directly.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, language: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.language = language
        missing = [token for token in (SPEECH, MOTION) if token not in tokenizer.get_added_vocab()]
        if missing:
            tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
        self.speech_id: int = tokenizer.convert_tokens_to_ids(SPEECH)
        self.pad_id: int = tokenizer.pad_token_id
        self.vocab_size = len(tokenizer)
        self._reserved = sorted(tokenizer.get_added_vocab())
        self._frame = _rendered(tokenizer)
        self.tail = self._parts("")[1]

    def prompt(self, text: str) -> list[int]:
        """Return the token ids of the chat with `text` before the placeholders.

        Raises:
            UserError: If the text contains a control token, or has no phonemes.
        """
        for token in self._reserved:
            if token in text:
                raise UserError(f"the text contains the control token {token}: remove it")
        return self._parts(phonemizer(self.language)(text) if self.language else text)[0]

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files to a release folder."""
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> TalkerTokenizer:
        """Load the tokenizer from a release folder, or from that of the released checkpoint.

        Raises:
            UserError: If the folder has no tokenizer, or its tokenizer is damaged or unsuitable.
        """
        folder = release_folder(folder)
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise UserError(f"{folder} has no tokenizer (tokenizer.json): copy or download the whole folder")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # a damaged file raises errors of its parser
            raise UserError(f"the tokenizer of {folder} cannot be read ({error}); copy or download it again") from error
        if tokenizer.chat_template is None or tokenizer.pad_token_id is None:
            raise UserError(
                f"the tokenizer of {folder} has no chat template or no padding token: expected that of Qwen3"
            )
        ours = folder / "config.yaml"
        return cls(tokenizer, language_of(read_yaml(ours).get("text") if ours.is_file() else None))

    def _parts(self, text: str) -> tuple[list[int], list[int]]:
        # Special tokens split a text first, so that both sides can be encoded separately.
        before, _, after = self._frame.replace(MARK, text).rpartition(SPEECH)
        return tuple(self.tokenizer.encode(part, add_special_tokens=False) for part in (before, after))


def load_tokenizer(tokenizer: str | Path | Mapping[str, str] | None) -> TalkerTokenizer:
    """Load the tokenizer of a folder, or create one: {kind: phonemes, language: en-us}. None: the byte-level
    tokenizer.
    """
    if tokenizer is None:
        return byte_tokenizer()
    if isinstance(tokenizer, Mapping):
        return phoneme_tokenizer(language_of(tokenizer))
    return TalkerTokenizer.from_pretrained(tokenizer)


def language_of(text: Mapping[str, str] | None) -> str | None:
    """Return the phoneme language of the setting `text`, or None if text is tokenized directly."""
    if text is None:
        return None
    if not isinstance(text, Mapping) or text.get("kind") != "phonemes" or text.get("language") not in LANGUAGES:
        raise UserError(f"text={text} is unknown; use {{kind: phonemes, language: {' or '.join(LANGUAGES)}}}")
    return text["language"]


def _rendered(tokenizer: PreTrainedTokenizerBase) -> str:
    """Render the chat template with user turn `MARK` and assistant turn `SPEECH`.

    A template is a program that may not terminate, so unknown templates are rendered in a separate process.
    """
    if tokenizer.chat_template == BYTE_TEMPLATE:
        return f"<|user|>{MARK}<|assistant|>{SPEECH}<|end|>"
    turns = [{"role": "user", "content": MARK}, {"role": "assistant", "content": SPEECH}]
    known = {"messages": turns, "add_generation_prompt": False, "enable_thinking": False}
    known |= tokenizer.special_tokens_map
    call = [sys.executable, "-P", "-c", RENDER]
    given = json.dumps([tokenizer.chat_template, known])
    try:
        done = subprocess.run(call, input=given, capture_output=True, text=True, timeout=RENDER_SECONDS)
        if done.returncode == 0 and done.stdout.count(MARK) == done.stdout.count(SPEECH) == 1:
            return done.stdout
        why = done.stderr.strip().rpartition("\n")[2] or "it omits a turn"
    except subprocess.TimeoutExpired:
        why = f"it takes more than {RENDER_SECONDS} s"
    raise UserError(f"the tokenizer's chat template cannot be used ({why}): expected that of Qwen3")


def split_text(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Split a text at sentences if possible, else at clauses, else at words. Parts without words are omitted.

    Args:
        text: the text.
        fits: whether a part is short enough.

    Raises:
        UserError: If a word is too long.
    """
    if fits(text):
        return [text]
    pieces = [text]
    for end in (SENTENCE, CLAUSE, WORD):
        pieces = [
            part
            for piece in pieces
            for part in ([piece] if fits(piece.strip()) else re.split(end, piece))
            if part.strip()
        ]
    parts = [""]
    for piece in pieces:
        if not fits(piece.strip()):
            raise UserError(
                f"{piece.strip()[:30]!r}... is too long for one part and has neither space nor punctuation: split it"
            )
        if not fits((parts[-1] + piece).strip()):
            parts.append("")
        parts[-1] += piece
    parts = [part.strip() for part in parts]
    return [part for part in parts if has_words(part)] or parts


def has_words(text: str) -> bool:
    """Return whether a text contains a letter, a digit or a symbol that is read aloud, not only punctuation."""
    return any(c.isalnum() or c in "%&@#*/" or unicodedata.category(c).startswith("S") for c in text)


def phoneme_tokenizer(language: str) -> TalkerTokenizer:
    """Create a tokenizer with one token per phoneme of a language, including stress, and per punctuation mark."""
    names = [BYTE_SPECIALS[0], *LANGUAGES[language]]
    vocabulary = {name: number for number, name in enumerate(names)}
    assert len(vocabulary) == len(names), "two phonemes have one name"
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=BYTE_SPECIALS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return TalkerTokenizer(_fast(tokenizer), language)


def byte_tokenizer() -> TalkerTokenizer:
    """Create a byte-level tokenizer: 256 bytes, four control tokens, the two frame tokens, 262 in all.

    Texts are converted to lower case, and white space at both ends is removed.
    """
    alphabet = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return TalkerTokenizer(_fast(tokenizer))


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the control tokens and chat template of small models."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=BYTE_SPECIALS[0],
        additional_special_tokens=[*BYTE_SPECIALS[1:], SPEECH, MOTION],
        chat_template=BYTE_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
