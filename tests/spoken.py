"""Speech of espeak-ng, for tests of what recognises words and voices."""

from concurrent.futures import ProcessPoolExecutor

from corpora.synthetic.speech import Synthesizer, Utterance
from tests import forked


def speak(sayings: list[tuple[str, str]]) -> list[Utterance]:
    """Speak pairs (text, lines of a voice), in a new process: a process can have only one synthesiser in its life."""
    with ProcessPoolExecutor(1, forked.SERVER) as pool:
        return pool.submit(_speak, sayings).result()


def _speak(sayings: list[tuple[str, str]]) -> list[Utterance]:
    synthesizer = Synthesizer()
    return [synthesizer.speak(*saying) for saying in sayings]
