"""A pipeline of the tiny release, a clip of a drawn talking head, and shards of made-up clips."""

import pytest
import torch
from drawn_faces import talking_head
from made_clips import made_clip
from shard_files import write_split

from engine.media.video import write_video
from hicodit.pipeline import HiCoDiTPipeline
from rvq_codec import RVQCodec


@pytest.fixture(scope="module")
def pipeline(release):
    return HiCoDiTPipeline.from_pretrained(release, precision="fp32")


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A silent 1.6 s clip."""
    path = tmp_path_factory.mktemp("clips") / "head.mp4"
    write_video(path, talking_head(40), 25)
    return path


@pytest.fixture(scope="session")
def corpus(release, tmp_path_factory):
    """Shards of six made-up clips, in three splits; words are a function of the mouth crops."""
    root = tmp_path_factory.mktemp("shards")
    digest = RVQCodec.from_pretrained(release.parent / "codec").digest()
    g = torch.Generator().manual_seed(0)
    for split in ("train", "seen", "unseen"):
        samples = []
        for i, frames in enumerate((12, 15, 13, 16, 30, 13)):
            level = torch.randint(0, 16, (frames, 1), generator=g)
            words = {
                "mouth": (level * 16).to(torch.uint8)[:, :, None].expand(-1, 48, 48).contiguous(),
                "phoneme": (level[:, 0] % 5).to(torch.uint8),
                "tokens": level.repeat_interleave(2, 0).expand(-1, 12).to(torch.int16).contiguous(),
            }
            clip = made_clip(frames, g, **words)
            clip["expression"] = (clip["expression"] + i) % 7
            samples.append(({"key": f"{split}_{i}", "frames": frames, "text": "bin blue at alpha one now"}, clip))
        write_split(root / split, samples, 4, digests={"rvq": digest})
    return root
