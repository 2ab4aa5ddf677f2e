"""Layouts of data sets, made small (files that sources do not open are empty), and splits by speaker."""

import csv
import json
import tarfile
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch

from corpora.preparation.clip import WorkItem, make_key
from corpora.preparation.media import Decode, Face, read_text
from corpora.preparation.sources import folder, held_out, lrs2, lrs3, voxceleb2
from corpora.preparation.sources_grid import grid
from corpora.preparation.sources_listed import emilia, talker_t2av_data, youtube_ids
from engine.errors import UserError
from engine.files import find_files
from engine.media.audio import write_wav
from engine.media.video import write_video
from tests.corpora.preparation_fakes import write_csv
from tests.drawn_faces import scene


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_voxceleb2_with_and_without_its_sound(tmp_path):
    touch(tmp_path, "dev/mp4/id00017/b_-x/00002.mp4", "dev/mp4/id00017/b_-x/00001.mp4", "dev/mp4/id00012/a/00001.mp4")
    touch(tmp_path, "dev/aac/id00012/a/00001.m4a", "dev/mp4/id00012/a/notes.txt", "test/mp4/id00020/c/00001.mp4")
    source = voxceleb2(tmp_path, validation=0)
    clips = source.clips("dev")
    assert source.splits == ["dev", "test"]
    assert [clip.key for clip in clips] == ["id00012-a-00001", "id00017-b_-x-00001", "id00017-b_-x-00002"]
    assert clips[0].audio == "dev/aac/id00012/a/00001.m4a" and clips[1].audio is None
    assert clips[1].video == clips[1].source == "dev/mp4/id00017/b_-x/00001.mp4"
    assert clips[1].speaker == "id00017" and clips[1].text is None


@pytest.mark.parametrize("top", ["", "mvlrs_v1/"])
def test_lrs2_by_its_lists_also_as_its_archive_unpacks(tmp_path, top):
    touch(tmp_path, *(f"{top}{name}.mp4" for name in ("main/63/00001", "main/63/00002", "pretrain/51/00007")))
    (tmp_path / "train.txt").write_text("63/00002\n")
    (tmp_path / "test.txt").write_text("63/00001 NF\n\n")
    source = lrs2(tmp_path)
    assert source.splits == ["pretrain", "train", "test"]
    (clip,) = source.clips("test")
    assert (clip.key, clip.video, clip.text_file) == ("63-00001", f"{top}main/63/00001.mp4", f"{top}main/63/00001.txt")
    assert source.clips("train")[0].video == f"{top}main/63/00002.mp4"
    (clip,) = source.clips("pretrain")
    assert (clip.video, clip.speaker) == (f"{top}pretrain/51/00007.mp4", "51")


def test_lrs3_and_the_words_of_its_texts(tmp_path):
    touch(tmp_path, "trainval/0Fi83BHQsMA/00004.mp4", "trainval/0Fi83BHQsMA/00002.mp4", "test/x/00001.mp4")
    (clip, _) = lrs3(tmp_path).clips("trainval")
    assert (clip.key, clip.text_file) == ("0Fi83BHQsMA-00002", "trainval/0Fi83BHQsMA/00002.txt")
    for content, words in (
        ("Text:  THAT'S  WHERE WE ARE \nConf:  4\n\nWORD START END\nTHAT'S 0.1 0.2\n", "THAT'S WHERE WE ARE"),
        ("just\nwords\n", "just words"),
    ):
        (tmp_path / "t.txt").write_text(content)
        assert read_text(tmp_path / "t.txt") == words


def test_keys_are_unique_or_the_source_is_refused(tmp_path):
    write_csv(tmp_path / "clips.csv", [{"path": p} for p in ("a/1.mp4", "a-1.mp4", "ä 1.mp4")])
    keys = [clip.key for clip in folder(tmp_path).clips("train")]
    assert keys[0].startswith("a-1-") and keys[1].startswith("a-1-") and keys[0] != keys[1] and keys[2] == "1"
    assert len(make_key("x/" * 90)) <= 80
    write_csv(tmp_path / "clips.csv", [{"path": "a.mp4"}, {"path": "a.mp4"}])
    with pytest.raises(UserError, match=r"a\.mp4"):
        folder(tmp_path).clips("train")


def test_a_table_lists_parts_of_a_file(tmp_path):
    parts = [{"path": "a.wav", "start": "", "end": ""}]
    parts += [{"path": "a.wav", "start": start, "end": start + 2} for start in (0, 2.5)]
    write_csv(tmp_path / "clips.csv", parts)
    clips = folder(tmp_path).clips("train")
    assert [clip.span for clip in clips] == [None, (0, 2), (2.5, 4.5)]
    assert len({clip.key for clip in clips}) == 3
    write_csv(tmp_path / "clips.csv", [{"path": "a.wav", "start": 2, "end": 1}])
    with pytest.raises(UserError, match="start=2 and end=1"):
        folder(tmp_path)


@pytest.mark.parametrize("row", ["one", "one,a.mp4,two"], ids=["shorter", "longer"])
def test_a_row_of_another_length_than_its_header_is_refused(tmp_path, row):
    (tmp_path / "clips.csv").write_text(f"text,path\nhello,b.mp4\n{row}\n")
    with pytest.raises(UserError, match="line 3"):
        folder(tmp_path)


def test_talker_data_by_table_and_by_list_inside_tar_files(tmp_path):
    write_wav(tmp_path / "s" / "one.wav", torch.zeros(26 * 960), 24_000)
    torch.save(torch.ones(25, 40), tmp_path / "one.pt")
    (tmp_path / "s" / "one.json").write_text('{"text": "hello there"}')
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        for name in ("s/one.wav", "s/one.json", "one.pt"):
            tar.add(tmp_path / name, f"./{name}")
            (tmp_path / name).unlink()
    (tmp_path / "list.txt").write_text("one.pt\n")
    write_csv(tmp_path / "t.csv", [{"motion_pt_path": "one.pt", "wav_path": "s/one.wav", "text": "from the table"}])
    for source, words in (
        (talker_t2av_data(tmp_path, listing="list.txt", sounds="s", tars="*.tar"), "hello there"),
        (talker_t2av_data(tmp_path, table="t.csv", tars="*.tar"), "from the table"),
    ):
        (info,) = source.clips("train")
        clip = WorkItem(info, source.root)
        Decode()(clip)
        clip.close()
        assert clip.facts["text"] == words and clip.facts["frames"] == clip.length == 25
        assert torch.equal(clip.tensors["motion"], torch.ones(25, 40).half()) and len(clip.wave) == 25 * 960


def by_split(source):
    return {split: source.clips(split) for split in source.splits}


def test_held_out_groups_are_a_function_of_their_names():
    names = [f"id{i:05d}" for i in range(200)]
    found = held_out(reversed(names), {"test": 0.1, "val": 0.05})
    assert found == held_out(names, {"test": 0.1, "val": 0.05})
    assert sorted(found.values()) == ["test"] * 20 + ["val"] * 10
    assert held_out(["a"], {"val": 0.5}) == {} and len(held_out(["a", "b"], {"val": 0.01})) == 1
    assert held_out(names, {"val": 0.0}) == {}


def test_validation_splits_of_videos_and_speakers_are_in_no_other_split(tmp_path):
    touch(tmp_path, *(f"lrs3/{split}/video{i}/00001.mp4" for split in ("pretrain", "trainval") for i in range(9)))
    touch(tmp_path, "lrs3/test/video0/00001.mp4", *(f"vox/dev/mp4/id{i}/a/1.mp4" for i in range(9)))
    touch(tmp_path, "vox/test/mp4/id9/a/1.mp4")
    clips = by_split(lrs3(tmp_path / "lrs3"))
    assert {split: len(found) for split, found in clips.items()} == {"pretrain": 8, "trainval": 8, "test": 1, "val": 1}
    (one,) = clips["val"]
    assert one.video.startswith("trainval/") and one.text_file.startswith("trainval/")
    assert one.speaker not in {clip.speaker for clip in clips["trainval"] + clips["pretrain"]}
    clips = by_split(voxceleb2(tmp_path / "vox"))
    assert {split: len(found) for split, found in clips.items()} == {"dev": 8, "val": 1, "test": 1}
    assert lrs3(tmp_path / "lrs3", validation=0).splits == ["pretrain", "trainval", "test"]


def test_names_of_grid_tell_speaker_and_words(tmp_path):
    touch(tmp_path, *(f"s{i}/bbaf2n.mpg" for i in (1, 2, 3, 4, 5, 20, 22)), "s7/s7/video/mpg_6000/swwz9s.mpg")
    touch(tmp_path, "s3/notes.mpg", "audio_25k/s3/bbaf2n.wav", "alignments/s3/bbaf2n.align")
    clips = by_split(grid(tmp_path))
    assert {split: len(found) for split, found in clips.items()} == {"train": 3, "val": 1, "test": 4}
    assert [clip.speaker for clip in clips["test"]] == ["s1", "s2", "s20", "s22"]
    every = {clip.key: clip for found in clips.values() for clip in found}
    assert (every["s3-bbaf2n"].speaker, every["s3-bbaf2n"].text) == ("s3", "bin blue at f two now")
    assert (every["s7-swwz9s"].speaker, every["s7-swwz9s"].text) == ("s7", "set white with z nine soon")


def test_linked_folders_of_grid_are_found(tmp_path):
    touch(tmp_path / "disk", "s1/bbaf2n.mpg")
    touch(tmp_path / "grid", "s3/bbaf2n.mpg")
    (tmp_path / "grid/s1").symlink_to(tmp_path / "disk/s1")
    for name in ("all", "again"):
        (tmp_path / "disk/s1" / name).symlink_to(tmp_path / "grid")  # an endless walk, if folders were visited twice
    (tmp_path / "grid/again").symlink_to(tmp_path / "grid/s3")
    found = [clip.speaker for clips in by_split(grid(tmp_path / "grid")).values() for clip in clips]
    assert sorted(found) == ["s1", "s3"] and len(find_files(tmp_path / "grid", ".mpg")) == 2


def test_grid_is_split_as_the_field_does(tmp_path):
    names = [f"{v}bbf{d}n" for v in "bl" for d in "123456789z"]  # twenty sentences of each speaker
    touch(tmp_path, *(f"s{i}/{name}.mpg" for i in (1, 2, 4, 9, 29) for name in names))
    (tmp_path / "s1" / "align").mkdir()
    (tmp_path / "s1" / "align" / "bbbf1n.align").write_text("0 14750 sil\n14750 20000 bin\n20000 25000 blue\n")
    unseen = by_split(grid(tmp_path, protocol="unseen"))
    speakers = {split: sorted({clip.speaker for clip in clips}) for split, clips in unseen.items()}
    assert speakers == {"train": ["s1"], "val": ["s29", "s9"], "test": ["s2", "s4"]}
    source = grid(tmp_path, protocol="seen", speakers=["s1", "s2"], expression="neutral")
    seen = by_split(source)
    assert {split: len(clips) for split, clips in seen.items()} == {"train": 36, "val": 2, "test": 2}
    few = by_split(grid(tmp_path, speakers=["s1", "s2"], clips_each=4))
    verbs = Counter((clip.speaker, clip.text.split()[0]) for clips in few.values() for clip in clips)
    assert verbs == dict.fromkeys(product(("s1", "s2"), ("bin", "lay")), 2)  # spread over the names
    assert all({clip.speaker for clip in clips} == {"s1", "s2"} for clips in seen.values())
    every = {clip.key: clip for clips in seen.values() for clip in clips}
    assert len(every) == 40 and every["s2-bbbf1n"].expression == "neutral" and every["s2-bbbf1n"].phonemes is None
    assert every["s1-bbbf1n"].phonemes == [("sil", 0.0, 0.59), ("bin", 0.59, 0.8), ("blue", 0.8, 1.0)]
    assert len(source.symbols) == 51 and {"bin", "blue", "zero", "f"} <= set(source.symbols)


def test_emilia_in_tar_files_and_unpacked(tmp_path):
    names = [f"EN_B00000_S{i:05d}_W000000" for i in range(3)] + ["ZH_B00000_S00000_W000000"]
    touch(tmp_path / "files", *(f"{name}.mp3" for name in names))
    (tmp_path / "data" / "EN").mkdir(parents=True)
    with tarfile.open(tmp_path / "data" / "EN" / "EN-B000000.tar", "w") as tar:
        for name in names:
            (tmp_path / "files" / f"{name}.json").write_text('{"text": "words"}')
            for suffix in ("mp3", "json"):
                tar.add(tmp_path / "files" / f"{name}.{suffix}", f"{name}.{suffix}")
    packed = by_split(emilia(tmp_path / "data"))
    unpacked = by_split(emilia(tmp_path / "files"))
    assert [len(found) for found in packed.values()] == [len(found) for found in unpacked.values()] == [3, 1]
    clip = packed["train"][0]
    assert set(clip.packed) == {clip.audio, clip.text_file} and clip.packed[clip.audio][0] == "EN/EN-B000000.tar"
    every = {clip.key: clip for found in packed.values() for clip in found}
    assert every[names[0]].speaker == "EN_B00000_S00000" and every[names[3]].language == "zh"
    only = [clip for found in by_split(emilia(tmp_path / "data", ["zh"])).values() for clip in found]
    assert [clip.key for clip in only] == [names[3]]


def parts(tmp_path, listing, *videos, **more):
    touch(tmp_path, *(f"videos/{name}" for name in videos))
    return [clip for found in by_split(youtube_ids(tmp_path, listing, **more)).values() for clip in found]


def test_avspeech_without_a_header_and_a_table_with_one(tmp_path, capsys):
    rows = [["aaaaaaaaaaa", 0.5, 3.25, 0.5, 0.25], ["bbbbbbbbbbb", 1, 2, 0.1, 0.2], ["aaaaaaaaaaa", 5, 4, 0.1, 0.1]]
    rows.append(["aaaaaaaaaaa", 5, 6, 0.1, "nan"])
    with (tmp_path / "avspeech_train.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    (clip,) = parts(tmp_path, "avspeech_train.csv", "aaaaaaaaaaa.webm")
    assert (clip.span, clip.face, clip.speaker) == ((0.5, 3.25), (0.5, 0.25, 0), "aaaaaaaaaaa")
    assert clip.video == "videos/aaaaaaaaaaa.webm" and clip.key == "aaaaaaaaaaa-0000500-0003250"
    assert "2 clips are skipped, as their rows are invalid" in capsys.readouterr().out
    (tmp_path / "mine.csv").write_text("id,start,end,text\naaaaaaaaaaa,1,2,hello\naaaaaaaaaaa,3,4,\n")
    one, two = parts(tmp_path, "mine.csv")
    assert (one.text, one.face, two.text) == ("hello", None, None)


def test_talkvid_and_celebv_hq(tmp_path):
    info = {"Video Link": "https://www.youtube.com/watch?v=Tr6MMsoWAog", "Person ID": "597"}
    talkvid = [{"id": "x", "start-time": 0.1, "end-time": 5.1, "info": info}]
    (tmp_path / "input.json").write_text(json.dumps(talkvid))
    (clip,) = parts(tmp_path, "input.json", "Tr6MMsoWAog.mp4")
    assert (clip.span, clip.speaker, clip.face) == ((0.1, 5.1), "597", None)
    box = {"top": 0.2, "bottom": 0.8, "left": 0.1, "right": 0.5}
    one = {"ytb_id": "Tr6MMsoWAog", "duration": {"start_sec": 1.0, "end_sec": 2.0}, "bbox": box}
    (tmp_path / "celebvhq.json").write_text(json.dumps({"meta_info": {}, "clips": {"Tr6MMsoWAog_0": one}}))
    (clip,) = parts(tmp_path, "celebvhq.json")
    assert clip.face == pytest.approx((0.3, 0.5, 0))


def test_hdtf_by_its_lists(tmp_path):
    files = {
        "RD_video_url.txt": "Radio1 https://www.youtube.com/watch?v=aaaaaaaaaaa\n",
        "RD_annotion_time.txt": "Radio1.mp4 00:20-01:35 1:00:00-1:00:05\n",
        "RD_crop_wh.txt": "Radio1_0.mp4 400 200 100 200\n",
        "RD_resolution.txt": "Radio1.mp4 720\n",
    }
    (tmp_path / "HDTF_dataset").mkdir()
    for name, text in files.items():
        (tmp_path / "HDTF_dataset" / name).write_text(text)
    one, two = parts(tmp_path, "HDTF_dataset", "RD_Radio1.mp4")
    assert one.video == "videos/RD_Radio1.mp4" and one.speaker == "Radio1"
    assert (one.span, one.face) == ((20.0, 95.0), (500.0, 200.0, 720)) and (two.span, two.face) == ((3600, 3605), None)


@pytest.mark.parametrize(("place", "left"), [("0.22,0.5", True), ("0.78,0.5", False)])
def test_a_part_of_a_video_with_the_face_at_the_named_place(tmp_path, place, left):
    """Two heads, of which the right one is larger; the clip is the second second of three."""
    frames = scene(75, [lambda i: (20, 10, 90), lambda i: (190, 0, 118)])
    frames[:25] //= 2
    frames[50:] //= 4
    wave = np.concatenate([np.full(24_000, level) for level in (0.1, 0.5, 0.9)])
    write_video(tmp_path / "videos" / "aaaaaaaaaaa.mp4", frames, 25, wave * np.sin(np.arange(72_000)), 24_000)
    (tmp_path / "list.csv").write_text(f"aaaaaaaaaaa,1.0,2.0,{place}\n")
    source = youtube_ids(tmp_path, "list.csv")
    clip = WorkItem(source.clips("train")[0], tmp_path)
    Decode()(clip)
    Face()(clip)
    assert clip.length == 25 and np.abs(clip.frames.astype(int) - frames[25:50]).mean() < 4
    assert np.abs(clip.wave[2000:-2000]).max() == pytest.approx(0.5, abs=0.05)
    assert (clip.track.boxes[:, 0].mean() < 150) == left
    (tmp_path / "list.csv").write_text("aaaaaaaaaaa,2.5,9.0,0.5,0.5\n")
    with pytest.raises(UserError, match=r"6\.48 s"):
        Decode()(WorkItem(youtube_ids(tmp_path, "list.csv").clips("train")[0], tmp_path))
