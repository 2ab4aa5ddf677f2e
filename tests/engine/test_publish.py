"""Publishing releases on a local replacement of the Hugging Face Hub."""

from pathlib import Path

import numpy as np
import pytest
from drawn_faces import talking_head
from huggingface_hub import HfApi, ModelCard, constants

from engine.errors import UserError
from engine.publish import publish
from hicodit.pipeline import HiCoDiTPipeline
from talker_t2av.pipeline import Job, TalkerPipeline
from tests.hub_stand_in import use_endpoint
from tests.talker_t2av.talker_fixtures import save_talker, voice_file


def test_a_published_hicodit_generates_the_same_speech(release, stand_in_hub):
    pipeline = HiCoDiTPipeline.from_pretrained(release)
    with pytest.raises(UserError, match="states no licence: set license="):
        pipeline.push_to_hub("someone/lips")
    assert not stand_in_hub.exists()
    assert pipeline.push_to_hub("someone/lips", license="apache-2.0") == f"{constants.ENDPOINT}/someone/lips"
    published = stand_in_hub / "someone/lips"
    files = {path.relative_to(published).as_posix() for path in published.rglob("*")}
    assert {"README.md", "config.yaml", "model.safetensors", "codec/config.yaml"} < files
    card = ModelCard.load(published / "README.md")
    assert (card.data.license, card.data.pipeline_tag, card.data.library_name) == (
        "apache-2.0", "video-to-video", "speaking-faces",
    )  # fmt: skip
    assert "lip-to-speech" in card.data.tags and card.text.strip() == "a test"
    other = HiCoDiTPipeline.from_pretrained("someone/lips")
    assert other.folder == published and str(other.codec_folders["codec"]).endswith("codec")
    clip = talking_head(10)
    np.testing.assert_array_equal(other(clip, seed=1).wave, pipeline(clip, seed=1).wave)


def test_a_published_talker_generates_the_same_speech(stand_in_hub, tmp_path):
    pipeline = TalkerPipeline.from_pretrained(save_talker(tmp_path))
    pipeline.push_to_hub("someone/talker", license="mit", private=True)
    other = TalkerPipeline.from_pretrained("someone/talker")
    assert all(stand_in_hub / "someone/talker" in Path(part).parents for part in other.system.codec_folders.values())
    assert HfApi.create_repo.call_args.kwargs == {"private": True, "exist_ok": True}
    job = Job("tts", "Hi.", str(voice_file(tmp_path / "voice.wav")), seed=1, max_seconds=0.32)
    np.testing.assert_array_equal(other(job).wave, pipeline(job).wave)


@pytest.mark.parametrize("name", ["toy", "someone/toy@main", "../toy"])
def test_a_wrong_name_is_refused_before_anything_is_uploaded(release, stand_in_hub, name):
    with pytest.raises(UserError, match="expected OWNER/NAME"):
        publish(release, {}, name, "mit", False)
    assert not HfApi.create_repo.called


def test_an_unreachable_hub_is_a_one_line_error(release, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    use_endpoint(monkeypatch, "http://127.0.0.1:9")  # nobody there
    with pytest.raises(UserError, match="someone/toy could not be published") as error:
        publish(release, {}, "someone/toy", "mit", False)
    assert "\n" not in str(error.value)
