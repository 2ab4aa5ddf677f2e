"""Sources whose file names, tar files or lists say what is in them; splits of speakers of their own."""

import csv
import json
import tarfile

import numpy as np
import pytest
from drawn_faces import scene

from corpora.preparation.clip import WorkItem
from corpora.preparation.faces import Face
from corpora.preparation.media import Decode
from corpora.preparation.sources import LRS3, VoxCeleb2, held_out
from corpora.preparation.sources_footage import YoutubeIds
from corpora.preparation.sources_listed import Emilia
from corpora.preparation.sources_studio import CREMAD, GRID, RAVDESS
from engine.errors import UserError
from engine.media.video import write_video


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def by_split(source):
    return {split: source.clips(split) for split in source.splits()}


def test_held_out_groups_are_a_function_of_their_names():
    names = [f"id{i:05d}" for i in range(200)]
    found = held_out(reversed(names), {"test": 0.1, "val": 0.05})
    assert found == held_out(names, {"test": 0.1, "val": 0.05})
    assert sorted(found.values()) == ["test"] * 20 + ["val"] * 10
    assert held_out(["a"], {"val": 0.5}) == {} and len(held_out(["a", "b"], {"val": 0.01})) == 1
    assert held_out(names, {"val": 0.0}) == {}
    with pytest.raises(UserError, match=r"split val=1\.5 must be a number"):
        held_out(names, {"val": 1.5})


def test_validation_splits_of_videos_and_speakers_are_in_no_other_split(tmp_path):
    touch(tmp_path, *(f"lrs3/{split}/video{i}/00001.mp4" for split in ("pretrain", "trainval") for i in range(9)))
    touch(tmp_path, "lrs3/test/video0/00001.mp4", *(f"vox/dev/mp4/id{i}/a/1.mp4" for i in range(9)))
    touch(tmp_path, "vox/test/mp4/id9/a/1.mp4")
    clips = by_split(LRS3(tmp_path / "lrs3"))
    assert {split: len(found) for split, found in clips.items()} == {"pretrain": 8, "trainval": 8, "test": 1, "val": 1}
    (one,) = clips["val"]
    assert one.video.startswith("trainval/") and one.text_file.startswith("trainval/")
    assert one.speaker not in {clip.speaker for clip in clips["trainval"] + clips["pretrain"]}
    clips = by_split(VoxCeleb2(tmp_path / "vox"))
    assert {split: len(found) for split, found in clips.items()} == {"dev": 8, "val": 1, "test": 1}
    assert LRS3(tmp_path / "lrs3", validation=0).splits() == ["pretrain", "trainval", "test"]


def test_grid(tmp_path):
    touch(tmp_path, *(f"s{i}/bbaf2n.mpg" for i in (1, 2, 3, 4, 5, 20, 22)), "s7/s7/video/mpg_6000/swwz9s.mpg")
    touch(tmp_path, "s3/notes.mpg", "audio_25k/s3/bbaf2n.wav", "alignments/s3/bbaf2n.align")
    clips = by_split(GRID(tmp_path))
    assert {split: len(found) for split, found in clips.items()} == {"train": 3, "val": 1, "test": 4}
    assert [clip.speaker for clip in clips["test"]] == ["s1", "s2", "s20", "s22"]
    every = {clip.key: clip for found in clips.values() for clip in found}
    assert every["s3-bbaf2n"].text == "bin blue at f two now" and every["s3-bbaf2n"].audio is None
    assert every["s7-swwz9s"].text == "set white with z nine soon" and every["s7-swwz9s"].speaker == "s7"


def test_crema_d(tmp_path):
    touch(tmp_path, *(f"VideoFlash/10{i:02d}_IEO_{e}_XX.flv" for i in range(1, 11) for e in ("ANG", "NEU")))
    touch(tmp_path, "AudioWAV/1001_IEO_ANG_XX.wav", "VideoFlash/README.flv")
    clips = by_split(CREMAD(tmp_path))
    assert {split: len(found) for split, found in clips.items()} == {"train": 16, "val": 2, "test": 2}
    speakers = [{clip.speaker for clip in found} for found in clips.values()]
    assert not (speakers[0] & speakers[1] or speakers[0] & speakers[2] or speakers[1] & speakers[2])
    every = {clip.key: clip for found in clips.values() for clip in found}
    angry = every["1001_IEO_ANG_XX"]
    assert (angry.expression, angry.text, angry.speaker) == ("angry", "it's eleven o'clock", "1001")
    assert angry.audio == "AudioWAV/1001_IEO_ANG_XX.wav" and every["1002_IEO_NEU_XX"].audio is None


def test_ravdess(tmp_path):
    touch(tmp_path, *(f"Actor_{i:02d}/01-01-06-01-02-01-{i:02d}.mp4" for i in range(1, 9)))
    touch(tmp_path, "Actor_01/02-01-06-01-02-01-01.mp4", "Actor_01/01-02-02-01-01-01-01.mp4", "Actor_01/03-01.wav")
    clips = by_split(RAVDESS(tmp_path))
    assert {split: len(found) for split, found in clips.items()} == {"train": 6, "val": 1, "test": 1}
    every = [clip for found in clips.values() for clip in found]
    assert {(clip.expression, clip.text) for clip in every} == {("fearful", "dogs are sitting by the door")}
    sung = [clip for found in by_split(RAVDESS(tmp_path, songs=True)).values() for clip in found]
    assert len(sung) == 9 and {clip.expression for clip in sung} == {"fearful", "neutral"}  # calm counts as neutral


def test_emilia_in_tar_files_and_unpacked(tmp_path):
    names = [f"EN_B00000_S{i:05d}_W000000" for i in range(3)] + ["ZH_B00000_S00000_W000000"]
    touch(tmp_path / "files", *(f"{name}.mp3" for name in names))
    (tmp_path / "data" / "EN").mkdir(parents=True)
    with tarfile.open(tmp_path / "data" / "EN" / "EN-B000000.tar", "w") as tar:
        for name in names:
            (tmp_path / "files" / f"{name}.json").write_text('{"text": "words"}')
            for suffix in ("mp3", "json"):
                tar.add(tmp_path / "files" / f"{name}.{suffix}", f"{name}.{suffix}")
    packed, unpacked = by_split(Emilia(tmp_path / "data")), by_split(Emilia(tmp_path / "files"))
    assert [len(found) for found in packed.values()] == [len(found) for found in unpacked.values()] == [3, 1]
    clip = packed["train"][0]
    assert set(clip.packed) == {clip.audio, clip.text_file} and clip.packed[clip.audio][0] == "EN/EN-B000000.tar"
    every = {clip.key: clip for found in packed.values() for clip in found}
    assert every[names[0]].speaker == "EN_B00000_S00000" and every[names[3]].language == "zh"
    only = [clip for found in by_split(Emilia(tmp_path / "data", ["zh"])).values() for clip in found]
    assert [clip.key for clip in only] == [names[3]]


def listed(tmp_path, listing, *videos, **more):
    touch(tmp_path, *(f"videos/{name}" for name in videos))
    return [clip for found in by_split(YoutubeIds(tmp_path, listing, **more)).values() for clip in found]


def test_avspeech_without_a_header_and_a_table_with_one(tmp_path, capsys):
    rows = [["aaaaaaaaaaa", 0.5, 3.25, 0.5, 0.25], ["bbbbbbbbbbb", 1, 2, 0.1, 0.2], ["aaaaaaaaaaa", 5, 4, 0.1, 0.1]]
    with (tmp_path / "avspeech_train.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    (clip,) = listed(tmp_path, "avspeech_train.csv", "aaaaaaaaaaa.webm")
    assert (clip.span, clip.face, clip.speaker) == ((0.5, 3.25), (0.5, 0.25, 0), "aaaaaaaaaaa")
    assert clip.video == "videos/aaaaaaaaaaa.webm" and clip.key == "aaaaaaaaaaa-0000500-0003250"
    said = capsys.readouterr().out
    assert "1 clips are left out, as" in said and "the first: clip 3: start=5 and end=4 are not two times" in said
    (tmp_path / "mine.csv").write_text("id,start,end,text\naaaaaaaaaaa,1,2,hello\naaaaaaaaaaa,3,4,\n")
    one, two = listed(tmp_path, "mine.csv")
    assert (one.text, one.face, two.text) == ("hello", None, None)
    with pytest.raises(UserError, match=r"none of its 2 clips can be used: is source\.videos=none right"):
        (tmp_path / "none").mkdir()
        YoutubeIds(tmp_path, "mine.csv", videos="none")


def test_talkvid_and_celebv_hq(tmp_path):
    talkvid = {"id": "x", "start-time": 0.1, "end-time": 5.1, "info": {"Video Link": "https://www.youtube.com/watch?v=Tr6MMsoWAog", "Person ID": "597"}}  # fmt: skip  # noqa: E501
    (tmp_path / "input.json").write_text(json.dumps([talkvid]))
    (clip,) = listed(tmp_path, "input.json", "Tr6MMsoWAog.mp4")
    assert (clip.span, clip.speaker, clip.face) == ((0.1, 5.1), "597", None)
    box = {"top": 0.2, "bottom": 0.8, "left": 0.1, "right": 0.5}
    one = {"ytb_id": "Tr6MMsoWAog", "duration": {"start_sec": 1.0, "end_sec": 2.0}, "bbox": box}
    (tmp_path / "celebvhq.json").write_text(json.dumps({"meta_info": {}, "clips": {"Tr6MMsoWAog_0": one}}))
    (clip,) = listed(tmp_path, "celebvhq.json")
    assert clip.face == pytest.approx((0.3, 0.5, 0))
    (tmp_path / "other.json").write_text('[{"start": 1}]')
    with pytest.raises(UserError, match=r"other\.json is no list of TalkVid or CelebV-HQ"):
        listed(tmp_path, "other.json")


def test_hdtf(tmp_path):
    files = {
        "RD_video_url.txt": "Radio1 https://www.youtube.com/watch?v=aaaaaaaaaaa\n",
        "RD_annotion_time.txt": "Radio1.mp4 00:20-01:35 1:00:00-1:00:05\n",
        "RD_crop_wh.txt": "Radio1_0.mp4 400 200 100 200\n",
        "RD_resolution.txt": "Radio1.mp4 720\n",
    }
    (tmp_path / "HDTF_dataset").mkdir()
    for name, text in files.items():
        (tmp_path / "HDTF_dataset" / name).write_text(text)
    one, two = listed(tmp_path, "HDTF_dataset", "RD_Radio1.mp4")
    assert one.video == "videos/RD_Radio1.mp4" and one.speaker == "Radio1"
    assert (one.span, one.face) == ((20.0, 95.0), (500.0, 200.0, 720)) and (two.span, two.face) == ((3600, 3605), None)


@pytest.mark.parametrize(("place", "left"), [("0.22,0.5", True), ("0.78,0.5", False)])
def test_a_part_of_a_video_with_the_face_at_the_named_place(tmp_path, place, left):
    """Two heads, of which the right one is larger; the clip is the second second of three."""
    frames = scene(75, [lambda i: (20, 10, 90), lambda i: (190, 0, 118)])
    frames[:25], frames[50:] = frames[:25] // 2, frames[50:] // 4
    wave = np.concatenate([np.full(24_000, level) for level in (0.1, 0.5, 0.9)])
    write_video(tmp_path / "videos" / "aaaaaaaaaaa.mp4", frames, 25, wave * np.sin(np.arange(72_000)), 24_000)
    (tmp_path / "list.csv").write_text(f"aaaaaaaaaaa,1.0,2.0,{place}\n")
    source = YoutubeIds(tmp_path, "list.csv")
    clip = WorkItem(source.clips("train")[0], tmp_path)
    Decode()(clip)
    Face()(clip)
    assert clip.length == 25 and np.abs(clip.frames.astype(int) - frames[25:50]).mean() < 4
    assert np.abs(clip.wave[2000:-2000]).max() == pytest.approx(0.5, abs=0.05)
    assert (clip.track.boxes[:, 0].mean() < 150) == left
    (tmp_path / "list.csv").write_text("aaaaaaaaaaa,2.5,9.0,0.5,0.5\n")
    with pytest.raises(UserError, match=r"6\.48 s of the list: they must be of one length"):
        Decode()(WorkItem(YoutubeIds(tmp_path, "list.csv").clips("train")[0], tmp_path))
