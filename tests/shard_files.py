"""Prepared shards of a few random samples, written as the format says, for tests of those who read them."""

import io
import json
import tarfile
import zlib
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor


def write_split(folder: Path, samples: list[tuple[dict, dict[str, Tensor]]], per_shard: int, **index) -> Path:
    """Write `samples`, (JSON with key and frames, tensors), as shards of `per_shard`; `index` joins index.json."""
    folder.mkdir(parents=True)
    shards = []
    for number in range(-(-len(samples) // per_shard)):
        part = samples[number * per_shard : (number + 1) * per_shard]
        name = f"{number:06d}"
        rows = []
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for info, tensors in part:
                members = {}
                for suffix, data in (("json", json.dumps(info).encode()), ("safetensors", save(tensors))):
                    entry = tarfile.TarInfo(f"{info['key']}.{suffix}")
                    entry.size = len(data)
                    members[suffix] = [tar.offset + tarfile.BLOCKSIZE, len(data)]
                    tar.addfile(entry, io.BytesIO(data))
                rows.append({"key": info["key"], "frames": info["frames"], "members": members})
        data = (folder / f"{name}.tar").read_bytes()
        about = {"bytes": len(data), "crc32": zlib.crc32(data)}
        every = {name for _, x in part for name in x}
        rows = [row | {"lacks": sorted(every - x.keys())} for row, (_, x) in zip(rows, part)]
        sidecar = {"version": 2, "samples": rows, "tensors": sorted(every), **about}
        (folder / f"{name}.json").write_text(json.dumps(sidecar))
        shards.append({"name": name, "clips": len(part), **about})
    whole = {"version": 2, "split": folder.name, "shards": shards, "clips": len(samples), **index}
    (folder / "index.json").write_text(json.dumps(whole))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by path; marks of verified shards are left out."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.parent.name != ".verified"
    }


def random_split(folder: Path, count: int = 23, per_shard: int = 5, **index) -> Path:
    """Samples k00, k01, ... of 8 to 40 frames: tensors x (frames, 3) float16, its first value i, and label () i."""
    g = torch.Generator().manual_seed(0)
    samples = []
    for i in range(count):
        frames = int(torch.randint(8, 41, (), generator=g))
        x = torch.randn(frames, 3, generator=g).half()
        x[0, 0] = i
        info = {"key": f"k{i:02d}", "frames": frames, "text": f"text {i}"}
        samples.append((info, {"x": x, "label": torch.tensor(i, dtype=torch.uint8)}))
    return write_split(folder, samples, per_shard, **index)
