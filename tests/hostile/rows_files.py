"""File names, checkpoints, shard indexes, configurations and `_target_` paths from an untrusted source."""

import io
import json
import pickle
import sys
import tarfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from corpora.preparation.sources import folder as table_source
from corpora.preparation.sources_listed import tar_members
from corpora.preparation.voice_corpus import prompt_sentences
from engine.evaluation.clips import read_clips
from engine.instantiate import build
from engine.release import read_release, save_release
from engine.shards.reader import Reading, ShardSplit
from engine.shards.recordings import read_manifest
from engine.training import checkpoint
from engine.training.checkpoint import Checkpoints
from engine.training.export import export
from engine.untrusted import MAX_NAME, parse_json, safe_name
from scripts.download_checkpoints import read_catalogue
from scripts.make_synthetic_corpus import prepare
from tests.shard_files import random_split

MEMORY = 2 * 2**30  # bytes by which reading one input may grow the process
BAD_NAMES = {
    "up": "../../..",
    "up inside": "a/../../../b",
    "empty": "",
    "hidden": ".bashrc",
    "backslashes": "..\\..\\x",
    "null byte": "a\0b",
    "line break": "a\nb",
    "escape": "a\x1b[2Jb",
    "too long": "x" * (MAX_NAME + 1),
    "number": 7,
}
NAME = r"must be a (file name|path)|must be a file name|cannot be read as JSON \(it contains a null"


def file(name: str, content: Any, read: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Write bytes, text or what torch saves to a file, and read it; with None, no file is written."""

    def call(folder: Path) -> None:
        path = folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif content is not None:
            torch.save(content, path)
        read(path)

    return call


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change the content of a JSON file."""
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))


class Payload:
    """What runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def a_run(folder: Path) -> Path:
    """Write a run with one checkpoint, as train.py does, and return the folder of the checkpoint."""
    checkpoints = Checkpoints(folder / "run" / "checkpoints", keep=1)
    step = checkpoints.save(1, {"model.net.w": torch.ones(3, 4), "ema.net.w": torch.ones(3, 4)}, INFO)
    checkpoints.wait()
    release = {"kind": "toy", "config": {}, "module": "net", "title": "Toy", "about": "A toy.", "usage": "x"}
    (folder / "run" / "release.json").write_text(json.dumps(release))
    return step


def forged(folder: Path, forge, use) -> None:
    """Change the pickled metadata of a run's checkpoint and the checksums with it, then use the run."""
    step = a_run(folder)
    metadata = pickle.loads((step / ".metadata").read_bytes())
    changed = forge(metadata, step)
    (step / ".metadata").write_bytes(pickle.dumps(metadata if changed is None else changed))
    sums = {path.name: checkpoint._fingerprint(path) for path in step.iterdir() if path.name != "info.json"}
    edit(step / "info.json", lambda info: info.update(files=sums))
    use(folder / "run")


def exported(run: Path) -> None:
    export(run, run.parent / "out")


def resumed(run: Path) -> None:
    checkpoint.load(
        checkpoint.newest(run / "checkpoints"), {f"{of}.net.w": torch.zeros(3, 4) for of in ("model", "ema")}
    )


def by_bytes(metadata, step: Path) -> None:
    """A tensor described as a pickled object, which torch would load without any list."""
    data = pickle.dumps(Payload(step / "ran"))
    (step / "__0_0.distcp").write_bytes(data)
    place = next(iter(metadata.storage_data.values()))
    place.offset = 0
    place.length = len(data)
    metadata.state_dict_metadata["ema.net.w"] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex("ema.net.w")] = place


def huge(metadata, step: Path) -> None:
    entry = metadata.state_dict_metadata["ema.net.w"]
    entry.size = torch.Size((10**6, 10**5))
    entry.chunks[0].sizes = entry.size


def elsewhere(metadata, step: Path) -> None:
    next(iter(metadata.storage_data.values())).relative_path = "../../../../secret"


def packed(metadata, step: Path) -> None:
    next(iter(metadata.storage_data.values())).transform_descriptors = ["zstd"]


def blob(metadata, step: Path) -> None:
    path = next(step.glob("*.distcp"))
    buffer = io.BytesIO()
    torch.save({"w": Payload(step / "ran")}, buffer)
    for place in metadata.storage_data.values():
        place.offset = 0
        place.length = len(buffer.getvalue())
    path.write_bytes(buffer.getvalue())


FORGED = {
    "payload instead of metadata": (lambda metadata, step: Payload(step / "ran"), r"\.metadata cannot be read"),
    "a tensor as a pickled object": (by_bytes, "BytesStorageMetadata"),
    "payload in a data file": (blob, r"cannot be read"),
    "a terabyte": (huge, "400,000,000,048 bytes"),
    "a data file elsewhere": (elsewhere, "must be a file name"),
    "packed data files": (packed, "its data files are compressed"),
}


def index_with(folder: Path, value: dict[str, Any], remote: bool = False) -> None:
    split = random_split(folder / "made" / "train", 3, 3)
    edit(split / "index.json", lambda index: index["shards"][0].update(value))
    ShardSplit(f"file://{split}" if remote else split, Reading(cache=str(folder / "cache"))).read(0)


def sidecar_with(folder: Path, change) -> None:
    split = random_split(folder / "train", 3, 3)
    edit(split / "000000.json", lambda sidecar: change(sidecar["samples"][0]))
    ShardSplit(split).read(0)


def place(at: int, size: int):
    return lambda sample: sample["members"].update(json=[at, size])


def key_outside_of_the_folder(folder: Path) -> None:
    """A shard with another key of the same length in it; its checksums are those of the changed file."""
    split = random_split(folder / "train", 3, 3)
    data = (split / "000000.tar").read_bytes().replace(b'"key": "k00"', b'"key": "../"')
    (split / "000000.tar").write_bytes(data)
    edit(split / "000000.json", lambda sidecar: sidecar.update(crc32=zlib.crc32(data)))
    edit(split / "index.json", lambda index: index["shards"][0].update(crc32=zlib.crc32(data)))
    ShardSplit(split).read(0)


def config_of(folder: Path, text: str) -> None:
    save_release(folder / "release", "toy", {"width": 3}, {"w": torch.ones(2)}, "")
    (folder / "release" / "config.yaml").write_text(text)
    read_release(folder / "release", "toy")


def tar_with(folder: Path, name: str) -> None:
    with tarfile.open(folder / "a.tar", "w") as tar:
        entry = tarfile.TarInfo(name)
        entry.size = 3
        tar.addfile(entry, io.BytesIO(b"abc"))
    tar_members(folder, "*.tar")


def table_of(path: Path) -> None:
    table_source(path.parent)


def manifest_of(path: Path) -> None:
    read_manifest(path.parent, "train")


def corpus_of(path: Path) -> None:
    prepare(path.parent, 0, 2, 0)


def prompts_of(path: Path) -> None:
    prompt_sentences(path.parent, path)


def clips_of(path: Path) -> None:
    read_clips(path, None, {})


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
CONFIGS = {  # text of a release's config.yaml, and the line
    BOMB: "it uses aliases",
    "kind: toy\nx: " + "[" * 100_000: "nested",
    "kind: toy\nx: " + "y" * 2**21: "has more than 1,048,576 bytes",
    "kind: toy\nx: !!python/object/apply:os.system [true]": "cannot be read as YAML",
}
SPLITS = ["..", ".", "../../../ran", "a/b"]
TARGETS = ["os.system", "engine.release.torch.load", "engine.nowhere.Thing", 7]
DEEP = {"_target_": "engine.shards.reader.Blocks", "sizes": [{"x": {"_target_": "os.getcwd"}}]}


def target(node: dict) -> None:
    build(OmegaConf.create(node))


INFO = {"config": {}, "samples": 0, "streams": 1, "group": 1}  # of a checkpoint
URL = "path: x, url: 'https://a.b/x'"


def listing(size: str) -> str:
    """Return a catalogue with one file."""
    return f"a: [{{what: w, licence: l, origin: o, files: [{{{URL}, {size}}}]}}]"


CATALOGUES = ("a: [b]", "a: [{}]", "[a]", f"a: [{{licence: l, origin: o, files: [{{{URL}}}]}}]")
SIZES = ("size: big", "size: -4")
CASES = [
    *(
        (f"checkpoint: {name}: {use.__name__}", partial(forged, forge=forge, use=use), line)
        for name, (forge, line) in FORGED.items()
        for use in (exported, resumed)
    ),
    *(
        (f"name: {name}, {'path' if folders else 'file'}", lambda _, n=value, f=folders: safe_name(n, "name", f), NAME)
        for name, value in {**BAD_NAMES, "subfolder": "a/b"}.items()
        for folders in (False, True)
        if not (folders and name == "subfolder")
    ),
    *(
        (f"index: a path, remote={remote}", partial(index_with, value={"name": "a/../../../b"}, remote=remote), NAME)
        for remote in (True, False)
    ),
    ("index: a negative size", partial(index_with, value={"bytes": -1}), "must have bytes, crc32"),
    *((f"sidecar: {k}", partial(sidecar_with, change=place(*k)), "outside") for k in ((0, 10**15), (-9, 9))),
    ("sample: a key outside of the folder", key_outside_of_the_folder, "a sample's key"),
    *((f"config: {k[:50]}", partial(config_of, text=k), line) for k, line in CONFIGS.items()),
    ("json: deeply nested", lambda _: parse_json("[" * 100_000, "it"), "it cannot be read as JSON: it is nested too"),
    ("json: a null character", lambda _: parse_json('{"a": "\\u0000"}', "it"), "it contains a null character"),
    ("catalogue: a path", file("list.yaml", "all: [{files: [{path: ../../x, url: u}]}]", read_catalogue), NAME),
    *((f"catalogue: {t}", file("list.yaml", t, read_catalogue), "is not a catalogue") for t in CATALOGUES),
    ("catalogue: no address", file("list.yaml", "a: [{files: [{path: x}]}]", read_catalogue), "set url or repo"),
    *((f"catalogue: {size}", file("list.yaml", listing(size), read_catalogue), "size=") for size in SIZES),
    *(
        (f"corpus: {t}", file("corpus.json", t, corpus_of), "describe a synthetic corpus")
        for t in ("[]", '{"voices": 1}')
    ),
    ("corpus: cut off", file("corpus.json", "{", corpus_of), "cannot be read"),
    ("prompts: not gzip", file("core.txt.gz", "a: b", prompts_of), "--transcripts .* cannot be read"),
    ("manifest: cut off", file("train.jsonl", '{"id": "a"}\n{"id": \n', manifest_of), "line 2 cannot be read"),
    *((f"table: split {n}", file("clips.csv", f"path,split\na.mp4,{n}\n", table_of), NAME) for n in SPLITS),
    ("clips: two of one id", file("clips.jsonl", '{"id": "a"}\n{"id": "a"}', clips_of), "line 2: id a"),
    ("clips: a path", file("clips.jsonl", '{"id": "../x"}', clips_of), "line 1: id"),
    ("tar: no tar", file("a.tar", b"no tar" * 200, lambda path: tar_members(path.parent, "*.tar")), "cannot be read"),
    ("tar: a path", partial(tar_with, name="../../../ran"), NAME),
    *((f"target: {n}", lambda _, n=n: target({"_target_": n}), "is not a class or function") for n in TARGETS),
    ("target: deep inside", lambda _: target(DEEP), "_target_=os.getcwd is not a class or function"),
]
assert "posix" in sys.builtin_module_names  # the payload and the rows of names are of POSIX systems
