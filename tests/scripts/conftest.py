"""Both models for tests of the service, tiny and with random weights."""

import pytest

from hicodit.pipeline import HiCoDiTPipeline
from talker_t2av.pipeline import TalkerPipeline
from tests.talker_t2av.talker_fixtures import save_talker, voice_file


@pytest.fixture(scope="module")
def models(release, tmp_path_factory):
    """(HiCoDiT, Talker, a voice's recording, which is alone in its folder)."""
    root = tmp_path_factory.mktemp("talker")
    talker = TalkerPipeline.from_pretrained(save_talker(root), precision="fp32")
    (root / "voices").mkdir()
    return HiCoDiTPipeline.from_pretrained(release, precision="fp32"), talker, voice_file(root / "voices" / "anna.wav")
