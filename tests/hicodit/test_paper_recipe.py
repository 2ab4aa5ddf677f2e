"""The sampler preset of the paper."""

from hicodit.settings import GuidanceScales, SamplerConfig, with_preset


def test_the_preset_of_the_paper_has_its_sampler_and_guidance():
    sampler, guidance = with_preset("paper", SamplerConfig("confidence", 3, 0.5), GuidanceScales())
    assert (sampler.method, sampler.steps, sampler.temperature) == ("euler", 64, 1.0)
    assert guidance == GuidanceScales(2.5, 1.25, 1.5, 2.0, "normalised")


def test_the_fast_preset_fits_releases_of_either_form_of_guidance():
    sampler, guidance = with_preset(
        "fast", SamplerConfig("euler", 64), GuidanceScales(all=2.0, guidance_form="literal")
    )
    assert (sampler.method, guidance.guidance_form, guidance.all) == ("confidence", "normalised", 2.0)
