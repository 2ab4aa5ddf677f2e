"""The sampler preset of the paper, and what its guidance scales amount to in both forms of the formula."""

import pytest

from hicodit.settings import GuidanceScales, SamplerConfig, with_preset


def test_the_preset_of_the_paper_has_its_sampler_and_guidance():
    sampler, guidance = with_preset("paper", SamplerConfig("confidence", 3, 0.5), GuidanceScales())
    assert (sampler.method, sampler.steps, sampler.temperature) == ("euler", 64, 1.0)
    assert guidance == GuidanceScales(2.5, 1.25, 1.5, 2.0, "normalised")


@pytest.mark.parametrize(("form", "none"), [("normalised", -6.25), ("literal", -5.25)])
def test_exponents_of_both_forms_at_the_scales_of_the_paper(form, none):
    exponents = GuidanceScales(2.5, 1.25, 1.5, 2.0, form).exponents()
    assert exponents == {"none": none, "all": 2.5, "identity": 1.25, "expression": 1.5, "lip": 2.0}
