"""The curve of samplers: what counts as an evaluation, what a point names, intervals."""

import numpy as np
import pytest

from benchmarks import samplers
from engine.errors import UserError
from hicodit.pipeline import HiCoDiTPipeline


@pytest.fixture(scope="module")
def pipeline(release):
    return HiCoDiTPipeline.from_pretrained(release, codec=release.parent / "codec", precision="fp32")


@pytest.mark.parametrize(
    ("text", "evaluations"),
    [
        ("fast,sampler.steps=3,guidance.all=2.5", 6),  # two branches
        ("fast,sampler.steps=3,guidance.all=1", 3),
        ("fast,sampler.steps=3,guidance.all=2.5,guidance.lip=1,guidance.identity=2", 12),
        ("fast,sampler.steps=4,guidance.all=2,guidance.late=0", 4),  # guidance never begins: one branch
    ],
)
def test_evaluations_are_steps_times_branches(pipeline, clip, text, evaluations):
    _, pipeline.sampler, pipeline.guidance = samplers.read_point(pipeline, text)
    crops = pipeline.crops(clip)
    with samplers.Evaluations(pipeline) as count:
        pipeline.run([crops, crops], [0, 1])
    assert count.rows == 2 * evaluations
    pipeline.run([crops], [0])
    assert count.rows == 2 * evaluations  # nothing is counted afterwards


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quick", "--points quick is no file of configs/sampler: choose fast, paper"),
        ("fast,steps=3", "steps is neither sampler.FIELD=VALUE nor"),
        ("fast,sampler.step=3", "unknown setting 'step'"),
        ("fast,sampler.steps=0", "sampler.steps=0 must be"),
    ],
)
def test_a_wrong_point_is_one_line(pipeline, text, message):
    with pytest.raises(UserError, match=message):
        samplers.read_point(pipeline, text)


def test_intervals_hold_the_figure():
    found = samplers.share("wer", np.array([0.0, 1, 2, 0]), np.array([4.0, 4, 4, 4]))
    assert found["wer"] == 0.1875 and found["wer_95"][0] <= 0.1875 <= found["wer_95"][1]
    a = np.arange(20.0)
    found = samplers.correlated("r", a, a + 3 * (-1) ** a)
    assert found["r_95"][0] < found["r"] < found["r_95"][1] < 1


def test_figures_of_a_row_are_those_of_the_clips_that_count():
    pairs = {"voice_similarity": [(0.5, 1), None, (0.6, 1)], "wer_free": [None] * 3, "energy_right_way": [(1, 1)] * 3}
    assert samplers.summarise(pairs, 7) == {
        "voices": 7,
        "voice_similarity": 0.55,
        "energy_moves_rightly": 1.0,
        "energy_moves_rightly_95": [1.0, 1.0],
    }


def test_the_chart_shows_every_figure(tmp_path):
    row = {"wer": 0.1, "wer_95": [0.0, 0.2], "own_voice_first": 0.5, "energy_correlation": 0.3}
    rows = [{"name": "true speech", **row}, {"name": "tokenizer alone", **row}]
    rows += [{"name": name, "evaluations": e, **row} for name in ("fast", "euler") for e in (8.0, 16.0)]
    samplers.chart(rows, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
