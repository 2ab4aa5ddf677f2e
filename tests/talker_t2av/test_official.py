"""The limits that the official program gives to generation, beside the golden cases, which end before them."""

import pytest
import torch
from talker_fixtures import tiny_model

from talker_t2av import official
from talker_t2av.system import MotionStats

# frames of a patch, channels
SIZE = 4
SPEECH = 32
MOTION = 40


@pytest.mark.parametrize(("prefix", "reference", "limit"), [(0, 41, 11 + 25), (9, 41, 11 - 3 + 25), (8, 8, 0 + 25)])
def test_speech_may_be_25_patches_longer_than_its_reference(prefix, reference, limit):
    request = official.library_method(
        tiny_model().config, [1, 2], torch.zeros(256), torch.zeros(prefix, SPEECH), reference
    )
    assert (request.prefix, request.max_patches) == (-(-prefix // SIZE), limit)
    assert request.rules.first_test == 25 // SIZE


def test_speech_and_motion_may_exceed_their_reference_by_15_patches_less_the_delay():
    config = tiny_model(delay=2).config
    request = official.library_method(config, [1], torch.zeros(256), torch.zeros(8, SPEECH), 41, torch.zeros(MOTION))
    assert (request.prefix, request.max_patches) == (2, 11 - 2 + 15 - 2)
    stats = MotionStats(torch.zeros(MOTION), torch.ones(MOTION))
    request = official.inference_script(
        config, stats, [1], torch.zeros(256), torch.zeros(40, SPEECH), torch.zeros(44, MOTION), prefix_seconds=0.5
    )
    assert (request.prefix, len(request.motion), request.max_patches) == (3 + 2, 12, 13 - 5 + 15 - 2)
