"""Publishing releases on a stand-in of the Hugging Face Hub, and reading them from there."""

from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_faces import talking_head
from huggingface_hub import HfApi, ModelCard, constants

from engine import hub
from engine.errors import UserError
from engine.publish import publish
from engine.release import read_release, save_release
from hicodit.pipeline import HiCoDiTPipeline
from talker_t2av.pipeline import Job, TalkerPipeline
from tests.hub_stand_in import use_endpoint
from tests.talker_t2av.talker_fixtures import save_talker, voice_file


def test_a_published_hicodit_generates_the_same_speech(release, stand_in_hub):
    pipeline = HiCoDiTPipeline.from_pretrained(release)
    with pytest.raises(UserError, match="license="):
        pipeline.push_to_hub("someone/lips")
    assert not stand_in_hub.exists()
    assert pipeline.push_to_hub("someone/lips", license="apache-2.0") == f"{constants.ENDPOINT}/someone/lips"
    published = stand_in_hub / "someone/lips"
    files = {path.relative_to(published).as_posix() for path in published.rglob("*")}
    assert {"README.md", "config.yaml", "model.safetensors", "codec/config.yaml"} < files
    card = ModelCard.load(published / "README.md")
    assert card.data.license == "apache-2.0" and card.text.strip() == "a test"
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
    with pytest.raises(UserError, match=r"^.*someone/toy.*$"):
        publish(release, {}, "someone/toy", "mit", False)


def test_a_release_on_the_hub_is_downloaded_and_cached(stand_in_hub, monkeypatch):
    save_release(stand_in_hub / "someone/toy", "toy", {"width": 8}, {"w": torch.arange(3.0)}, "card")
    config, state = read_release("someone/toy", "toy")
    assert config == {"width": 8} and torch.equal(state["w"], torch.arange(3.0))
    hub._snapshot.cache_clear()
    use_endpoint(monkeypatch, "http://127.0.0.1:9")  # nobody there
    assert torch.equal(read_release("someone/toy", "toy")[1]["w"], torch.arange(3.0))
    assert [call.kwargs["local_files_only"] for call in hub.snapshot_download.call_args_list] == [False, True]
    for offline, word in ((False, "reached"), (True, "HF_HUB_OFFLINE")):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        with pytest.raises(UserError, match=f"someone/other .*{word}"):
            read_release("someone/other", "toy")


def test_a_bundled_release_is_found_beside_another_folder_assets(tmp_path, monkeypatch):
    (tmp_path / "assets").mkdir()
    monkeypatch.chdir(tmp_path)
    hub.check_release("weights", "assets/voice_tiny")
    assert (hub.release_folder("assets/voice_tiny") / "model.safetensors").is_file()
    with pytest.raises(UserError, match="not found"):
        hub.check_release("weights", "assets/voice_tinny")


def test_a_mistyped_path_or_name_on_the_hub_is_an_error(stand_in_hub, tmp_path):
    (tmp_path / "assets").mkdir()
    for place in ("assets/hicodit_tinny", "/no/where", "./a/b", "a/b/c", "nothing"):
        with pytest.raises(UserError, match="not found"):
            read_release(place, "toy")
    with pytest.raises(UserError, match=r"someone/else .*hub"):
        read_release("someone/else", "toy")
