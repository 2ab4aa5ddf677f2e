"""Folder layouts, made small; the files are empty, as sources do not open them."""

import csv
import io
import tarfile

import pytest
import torch

from corpora.preparation.clip import WorkItem, make_key
from corpora.preparation.media import Decode, read_text
from corpora.preparation.sources import LRS2, LRS3, Folder, Synthetic, VoxCeleb2
from corpora.preparation.sources_listed import TalkerData, WavList
from engine.errors import UserError
from engine.media.audio import write_wav


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def test_voxceleb2_with_and_without_its_sound(tmp_path):
    touch(tmp_path, "dev/mp4/id00017/b_-x/00002.mp4", "dev/mp4/id00017/b_-x/00001.mp4", "dev/mp4/id00012/a/00001.mp4")
    touch(tmp_path, "dev/aac/id00012/a/00001.m4a", "dev/mp4/id00012/a/notes.txt", "test/mp4/id00020/c/00001.mp4")
    source = VoxCeleb2(tmp_path, validation=0)
    clips = source.clips("dev")
    assert source.splits() == ["dev", "test"]
    assert [clip.key for clip in clips] == ["id00012-a-00001", "id00017-b_-x-00001", "id00017-b_-x-00002"]
    assert clips[0].audio == "dev/aac/id00012/a/00001.m4a" and clips[1].audio is None
    assert clips[1].video == clips[1].source == "dev/mp4/id00017/b_-x/00001.mp4"
    assert clips[1].speaker == "id00017" and clips[1].text is None


def test_lrs2_by_its_lists(tmp_path):
    touch(tmp_path, "main/63/00001.mp4", "main/63/00002.mp4", "pretrain/51/00007.mp4")
    (tmp_path / "train.txt").write_text("63/00002\n")
    (tmp_path / "test.txt").write_text("63/00001 NF\n\n")
    source = LRS2(tmp_path)
    assert source.splits() == ["pretrain", "train", "test"]
    (clip,) = source.clips("test")
    assert (clip.key, clip.video, clip.text_file) == ("63-00001", "main/63/00001.mp4", "main/63/00001.txt")
    assert source.clips("train")[0].video == "main/63/00002.mp4"
    assert source.clips("pretrain")[0].video == "pretrain/51/00007.mp4"


def test_lrs2_as_its_archive_unpacks(tmp_path):
    touch(tmp_path, "mvlrs_v1/main/63/00001.mp4", "mvlrs_v1/pretrain/51/00007.mp4")
    (tmp_path / "val.txt").write_text("63/00001\n")
    source = LRS2(tmp_path)
    assert source.splits() == ["pretrain", "val"]
    assert source.clips("val")[0].text_file == "mvlrs_v1/main/63/00001.txt"
    assert source.clips("pretrain")[0].speaker == "51"


def test_lrs3_and_the_words_of_its_texts(tmp_path):
    touch(tmp_path, "trainval/0Fi83BHQsMA/00004.mp4", "trainval/0Fi83BHQsMA/00002.mp4", "test/x/00001.mp4")
    (clip, _) = LRS3(tmp_path).clips("trainval")
    assert (clip.key, clip.text_file) == ("0Fi83BHQsMA-00002", "trainval/0Fi83BHQsMA/00002.txt")
    text = tmp_path / "t.txt"
    text.write_text("Text:  THAT'S  WHERE WE ARE \nConf:  4\n\nWORD START END\nTHAT'S 0.1 0.2\n")
    assert read_text(text) == "THAT'S WHERE WE ARE"
    text.write_text("just\nwords\n")
    assert read_text(text) == "just words"


def test_a_folder_with_a_table(tmp_path):
    rows = [("a/1.mp4", "one", ""), ("b.mov", "", "val"), ("c.flac", "", "val")]
    rows = [{"path": path, "text": text, "speaker": "", "split": split} for path, text, split in rows]
    write_csv(tmp_path / "clips.csv", rows)
    source = Folder(tmp_path)
    assert source.splits() == ["train", "val"]
    (clip,) = source.clips("train")
    assert (clip.key, clip.text, clip.speaker, clip.audio) == ("a-1", "one", None, None)
    pictures, sound = source.clips("val")
    assert (pictures.text, pictures.video, sound.video, sound.audio) == (None, "b.mov", None, "c.flac")


def test_keys_are_unique_or_the_source_is_refused(tmp_path):
    write_csv(tmp_path / "clips.csv", [{"path": p} for p in ("a/1.mp4", "a-1.mp4", "ä 1.mp4")])
    keys = [clip.key for clip in Folder(tmp_path).clips("train")]
    assert keys[0].startswith("a-1-") and keys[1].startswith("a-1-") and keys[0] != keys[1] and keys[2] == "1"
    assert len(make_key("x/" * 90)) <= 80
    write_csv(tmp_path / "clips.csv", [{"path": "a.mp4"}, {"path": "a.mp4"}])
    with pytest.raises(UserError, match=r"a\.mp4 is listed more than once"):
        Folder(tmp_path).clips("train")


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
        (TalkerData(tmp_path, listing="list.txt", sounds="s", tars="*.tar"), "hello there"),
        (TalkerData(tmp_path, table="t.csv", tars="*.tar"), "from the table"),
    ):
        (info,) = source.clips("train")
        clip = WorkItem(info, source.root)
        Decode()(clip)
        clip.close()
        assert clip.facts["text"] == words and clip.facts["frames"] == clip.length == 25
        assert torch.equal(clip.tensors["motion"], torch.ones(25, 40).half()) and len(clip.wave) == 25 * 960
    with pytest.raises(UserError, match=r"tars=\*\.zip"):
        TalkerData(tmp_path, table="t.csv", tars="*.zip")
    (tmp_path / "bad.tar").write_bytes(io.BytesIO(b"no tar" * 200).getvalue())
    with pytest.raises(UserError, match=r"bad\.tar cannot be read"):
        TalkerData(tmp_path, table="t.csv", tars="*.tar")


def test_a_list_of_sound_files(tmp_path):
    touch(tmp_path, "a/1.wav", "b.mp3")
    (tmp_path / "a" / "1.json").write_text('{"text": "hello"}')
    (tmp_path / "list.txt").write_text("a/1.wav\nb.mp3\n")
    one, two = WavList(tmp_path, "list.txt", validation=0).clips("train")
    assert (one.key, one.audio, one.text_file, one.video) == ("a-1", "a/1.wav", "a/1.json", None)
    assert (two.key, two.audio, two.text_file) == ("b", "b.mp3", None)
    with pytest.raises(UserError, match=r"the list .*none\.txt cannot be read"):
        WavList(tmp_path, "none.txt").clips("train")


def test_wrong_roots_and_splits_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"source\.root=.*nothing is not a folder"):
        LRS3(tmp_path / "nothing")
    with pytest.raises(UserError, match="has no split train; there are: none"):
        Synthetic(tmp_path).clips("train")
    with pytest.raises(UserError, match=r"clips\.csv cannot be read"):
        Folder(tmp_path)
