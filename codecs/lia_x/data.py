"""Training data of LIA-X: frames of the same clip, from video files decoded once to a cache, or from prepared shards.

Axes: B pairs, N clips, K stored frames per clip, L ground-truth movements, H height, W width,
S side of the network's square.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import default_collate

from engine.errors import SkippedClips, UserError
from engine.evaluation.validation import Share
from engine.files import atomic_output
from engine.media.video import read_video
from engine.metrics.lips import LandmarkReader, eye_closure, mouth_opening
from engine.progress import progress_bar
from engine.settings import require_range
from engine.shards.reader import Blocks, Reading, ShardSplit
from engine.shards.recordings import is_prepared, read_manifest, spread
from engine.shards.source import join
from lia_x.augment import Augment
from lia_x.losses import region_weights

MEASURES = {"open": mouth_opening, "blink": eye_closure}  # tracks that can be measured in images of real faces
PORTRAITS = ("portraits", "portraits_at")  # tensors of a prepared clip, see `pack_portraits`
QUALITY = 95  # JPEG quality
# maximum bytes and pixels of a stored image
MAX_PICTURE = 2**24
MAX_SIDE = 4096


def sample_frames(path: str | Path, count: int, size: int, shift: float = 0.5) -> np.ndarray:
    """Read `count` evenly spaced frames of a video as (count, S, S, 3) uint8 RGB, resized by area averaging.

    OpenCV is several times as fast as a decoder process per clip, and pairs need no exact frame rate.

    Args:
        shift: relative position of each frame within its part of the clip, in [0, 1). Frames are repeated in short
            clips.
    """
    capture = cv2.VideoCapture(str(path))
    total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
    wanted = _positions(total, count, shift)
    frames: list[np.ndarray] = []
    for position in range(total):
        if not capture.grab():
            break
        for _ in range(int((wanted == position).sum())):
            frames.append(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))
    capture.release()
    if not frames:
        raise UserError(f"{path}: cannot read any frames")
    frames += frames[-1:] * (count - len(frames))  # containers may report one frame too many
    if frames[0].shape[:2] != (size, size):
        frames = [cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA) for frame in frames]
    return np.stack(frames)


class FramePairs:
    """Pairs of different frames of a clip, one pair per clip and epoch.

    For recordings, `frames` frames of each clip of ROOT/SPLIT are decoded once to a file in the folder `cache` (S x S x
    3 bytes each), which is memory-mapped. Unreadable clips are skipped with a message. Prepared shards contain images
    (preparation stage `portraits`), which are scaled to S; clips without images are skipped.

    Args:
        root, split: recordings, a folder and the split whose manifest names the clips (ID.mp4, square images of one
            face; others are resized without preserving the aspect ratio); or prepared shards, ROOT/SPLIT/index.json in
            a folder or at a URL.
        size: S.
        frames: K, at least 2. Not used for shards.
        cache: folder for the decoded frames. Not used for shards.
        tracks: ground-truth movements of the manifest's `mouth` or `pose`, one number per frame, and their factors.
            Shards support `open`, the mouth opening in units of the distance between the eyes, and `blink`, from 0 to 1
            for closed eyes. They are measured with dlib's landmarks at the start (extra `landmarks`), and NaN for clips
            in which dlib detects no face.
        shards: fields of `engine.shards.reader.Reading`.
    """

    blocks: Blocks | None = None

    def __init__(
        self,
        root: str | Path,
        size: int,
        cache: str | Path | None = None,
        split: str = "train",
        frames: int = 12,
        tracks: Mapping[str, float] | None = None,
        shards: Mapping[str, Any] | None = None,
    ):
        if frames < 2:
            raise UserError(f"data.train.frames={frames}: a pair needs 2 or more frames of a clip")
        self.size = size
        self.stored = None
        self.movements = list(tracks or ())  # names, (L,)
        self.tracks: Tensor | list[Tensor] | None = None  # (K, L) of each clip
        if is_prepared(root, split):
            if tracks and not set(tracks) <= set(MEASURES):
                raise UserError(
                    f"data.train.tracks={list(tracks)}: of real faces, only {list(MEASURES)} can be measured"
                )
            self.stored = _stored_portraits(root, split, Reading(**(shards or {})))
            self.blocks = self.stored.blocks()
            if tracks:
                self.tracks = _measure(self.stored, size, tracks)
            return
        if cache is None:
            raise UserError("data.train.cache: set a folder for the decoded frames of recordings")
        rows = read_manifest(root, split)
        ids = [row["id"] for row in rows]
        phases = np.random.default_rng(0).random(len(ids))  # a common phase for all clips would miss periodic movements
        clips = [Path(root) / split / f"{name}.mp4" for name in ids]
        found = "\n".join(f"{clip.stem} {clip.stat().st_size if clip.is_file() else 0}" for clip in clips)
        digest = hashlib.blake2b(found.encode(), digest_size=4).hexdigest()
        path = Path(cache) / f"frames-{split}-{size}px-{frames}-{digest}.npy"
        kept_file = path.with_suffix(".kept.npy")  # indices of the readable clips, if not all
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):  # one process decodes while the others wait
                if not path.is_file():
                    _decode(clips, path, kept_file, size, phases, frames)
        self.pictures = np.load(path, mmap_mode="r")  # (N, K, S, S, 3)
        self.kept = np.load(kept_file) if kept_file.is_file() else np.arange(len(ids))
        if len(self.kept) < len(ids):
            print(f"{path}: without {len(ids) - len(self.kept)} unreadable clips of {len(ids)}", file=sys.stderr)
        if tracks:  # (N, K, L)
            self.tracks = torch.stack([_tracks(rows[i], tracks, frames, phases[i]) for i in self.kept])

    def __len__(self) -> int:
        return len(self.stored if self.stored is not None else self.kept)

    def prefetch(self, spans: list[tuple[int, int]]) -> None:
        """Prefetch clips [first, last), which are read next."""
        self.stored.prefetch(spans)

    def load(self, index: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return {"frames": (2, S, S, 3) uint8}, with tracks also {"tracks": (2, L)}, as a function of (index,
        generator).
        """
        if self.stored is not None:
            packed, starts = map(self.stored.read(index, PORTRAITS)[1].get, PORTRAITS)
            if len(starts) < 3:  # preparation rejects such a clip
                raise UserError(f"{self.stored.source}: a clip has fewer than 2 images: prepare it again")
            chosen = torch.randperm(len(starts) - 1, generator=generator)[:2].tolist()
            frames = unpack_portraits(packed, starts, self.size, chosen)
        else:
            chosen = torch.randperm(self.pictures.shape[1], generator=generator)[:2].tolist()
            frames = np.stack([self.pictures[index, k] for k in chosen])
        item = {"frames": torch.from_numpy(frames)}
        return item if self.tracks is None else item | {"tracks": self.tracks[index][chosen]}

    collate = staticmethod(default_collate)  # {"frames": (B, 2, S, S, 3) bytes}, with tracks also {"tracks": (B, 2, L)}

    def speakers(self) -> list[str]:
        """Return the person in each clip, (N,), or "" if unknown."""
        assert self.stored is not None, "not available for recordings"
        return [self.stored.read(index, ())[0].get("speaker") or "" for index in range(len(self))]


class RealAndDrawn:
    """Pairs of cartoon faces without augmentation, and augmented pairs of real people. Not shuffled by blocks.

    Args:
        drawn: pairs of cartoon faces.
        people: pairs of real people, from prepared shards.
        size: S.
        regions: see `region_weights`; they move with the image.
        drawn_repeats: repetitions of each cartoon clip per epoch.
        people_repeats: repetitions of each clip of the person with the most clips. Clips of other people are repeated
            more often, so that all people occur equally often.
        moving: additional loss weight of changing pixels in pairs of real people, times their change relative to the
            mean change. Without it, copying a static image is nearly optimal.
        augment: fields of `Augment`.
    """

    def __init__(
        self,
        drawn: FramePairs,
        people: FramePairs,
        size: int,
        regions: Sequence[Mapping[str, float]] = (),
        drawn_repeats: int = 1,
        people_repeats: int = 1,
        moving: float = 0.0,
        augment: Mapping[str, float] | None = None,
    ):
        require_range("data.train.moving", moving, 0.0, 100.0)
        if drawn.movements and people.movements and drawn.movements != people.movements:
            raise UserError(
                f"data.train.drawn.tracks={drawn.movements} and data.train.people.tracks={people.movements}: set the "
                "same movements in the same order"
            )
        movements = drawn.movements or people.movements
        self.unknown = {"tracks": torch.full((2, len(movements)), torch.nan)} if movements else {}
        self.drawn = drawn
        self.people = people
        self.size = size
        self.moving = moving
        self.augment = Augment(**(augment or {}))
        self.weights = region_weights(size, regions)[0, 0].numpy()
        names = people.speakers()
        counts = Counter(names)
        largest = max(counts.values())
        turns = [people_repeats * round(largest / counts[name]) for name in names]
        self.items = [(drawn, index) for index in range(len(drawn)) for _ in range(drawn_repeats)]
        self.items += [(people, index) for index, count in enumerate(turns) for _ in range(count)]

    def __len__(self) -> int:
        return len(self.items)

    def load(self, index: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return a pair of one clip, as a function of (index, generator).

        Returns:
            frames: (2, S, S, 3) bytes.
            views: (2, S, S, 3) uint8, the same frames with other colours, from which motion is encoded.
            weights: (S, S), loss weight of each pixel.
            drawn: whether it is a cartoon face, for which views equal frames.
            tracks: (2, L), movements, NaN where unknown. Omitted if no movements are read.
        """
        pairs, index = self.items[index]
        item = self.unknown | {"drawn": torch.tensor(pairs is self.drawn)} | pairs.load(index, generator)
        frames = item["frames"]
        if pairs is self.drawn:
            return item | {"views": frames, "weights": torch.from_numpy(self.weights)}
        seed = int(torch.randint(2**31, (), generator=generator))
        rng = np.random.default_rng(seed)
        moved, grid = self.augment.frame(frames.numpy(), self.size, rng)
        at = (grid * self.size - 0.5).astype(np.float32)
        weights = cv2.remap(self.weights, at, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        if self.moving:
            weights = weights * (1 + self.moving * relative_change(moved))
            weights = weights / weights.mean()
        return item | {
            "frames": torch.from_numpy(self.augment.recolour(moved, rng)),
            "views": torch.from_numpy(self.augment.recolour(moved, rng)),
            "weights": torch.from_numpy(weights),
        }

    collate = staticmethod(default_collate)


def relative_change(frames: np.ndarray) -> np.ndarray:
    """Return the smoothed change of each pixel between two frames (2, S, S, 3), relative to the mean: (S, S), at most
    12.
    """
    change = np.abs(frames[0].astype(np.float32) - frames[1]).mean(-1)
    change = cv2.GaussianBlur(change, (0, 0), change.shape[0] / 80)
    return (change / (change.mean() + 0.1)).clip(0, 12)


def held_out_frames(
    root: str | Path, split: str, count: int, size: int, share: Share
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the indices and frames (T, H, W, 3) of this process's share of `count` evenly spaced clips of ROOT/SPLIT.

    For prepared shards, they are the images of the clip in the shards, scaled to S = `size`.
    """
    if is_prepared(root, split):
        stored = _stored_portraits(root, split)
        chosen = spread(len(stored), count)
        for index in share.range(len(chosen)):
            packed, starts = map(stored.read(chosen[index], PORTRAITS)[1].get, PORTRAITS)
            yield index, unpack_portraits(packed, starts, size)
        return
    rows = read_manifest(root, split)
    rows = [rows[index] for index in spread(len(rows), count)]
    for index in share.range(len(rows)):
        yield index, read_video(Path(root) / split / f"{rows[index]['id']}.mp4")


def _stored_portraits(root: str | Path, split: str, reading: Reading | None = None) -> ShardSplit:
    stored = ShardSplit(join(root, split), reading, least_frames=2)
    stored.check_contains("portraits")
    stored.require(*PORTRAITS)
    return stored


def _measure(stored: ShardSplit, size: int, factors: Mapping[str, float]) -> list[Tensor]:
    """Return the movements in the images of each clip times their factors, (K, L); NaN if dlib detects no face."""
    find = LandmarkReader().landmarks
    tracks = []
    for index in progress_bar(range(len(stored)), len(stored), "clips"):
        packed, starts = map(stored.read(index, PORTRAITS)[1].get, PORTRAITS)
        try:
            points = find(unpack_portraits(packed, starts, size))
            values = np.stack([factor * MEASURES[name](points) for name, factor in factors.items()], 1)
        except UserError:
            values = np.full((len(starts) - 1, len(factors)), np.nan)
        tracks.append(torch.from_numpy(values).float())
    return tracks


def _positions(total: int, count: int, shift: float) -> np.ndarray:
    """Return indices (count,) of evenly spaced frames out of `total`."""
    return ((np.arange(count) + shift) * total / count).astype(int)


def _tracks(row: dict, factors: Mapping[str, float], frames: int, phase: float) -> Tensor:
    """Return the requested movements times their factors, (K, L), at the frames of `sample_frames`."""
    known = row.get("mouth", {}) | row.get("pose", {})
    for name in factors:
        if name not in known:
            raise UserError(f"data.train.tracks: the manifest has no track {name!r} of clip {row['id']}")
    values = torch.tensor([known[name] for name in factors]).T * torch.tensor(list(factors.values()))
    return values[_positions(len(values), frames, phase)]


def _decode(paths: list[Path], out: Path, kept_file: Path, size: int, phases: np.ndarray, frames: int) -> None:
    """Write the frames of all clips as one array (N, K, S, S, 3), and the list of readable clips, whose frames come
    first.
    """
    kept = []
    skipped = SkippedClips(out.parent, len(paths))
    with atomic_output(out) as partial:
        shape = (len(paths), frames, size, size, 3)
        array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
        for i, path in progress_bar(enumerate(paths), len(paths), "clips"):
            try:
                array[len(kept)] = sample_frames(path, frames, size, float(phases[i]))
                kept.append(i)
            except UserError as error:
                skipped.warn(path.stem, error)
        if not kept:
            raise UserError(f"{paths[0].parent}: none of its {len(paths)} clips can be read, for the reasons above")
        array.flush()
        kept_file.unlink(missing_ok=True)
        if len(kept) < len(paths):
            with atomic_output(kept_file) as partial_list:
                np.save(partial_list, np.array(kept))


def pack_portraits(frames: np.ndarray, size: int) -> tuple[Tensor, Tensor]:
    """Encode images (K, H, W, 3) RGB as JPEG of S x S: bytes (n,) uint8, and start offsets (K + 1,) int64."""
    files = []
    for frame in frames:
        if frame.shape[:2] != (size, size):
            frame = cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA)
        coded = cv2.imencode(".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1]
        files.append(coded.ravel())
    starts = np.cumsum([0, *map(len, files)])
    return torch.from_numpy(np.concatenate(files)), torch.from_numpy(starts)


def unpack_portraits(packed: Tensor, starts: Tensor, size: int, chosen: Sequence[int] | None = None) -> np.ndarray:
    """Decode images (k, S, S, 3) RGB from the output of `pack_portraits`.

    Args:
        chosen: indices of the k images to decode. None: all images.
    """
    frames = []
    for k in range(len(starts) - 1) if chosen is None else chosen:
        coded = packed[int(starts[k]) : int(starts[k + 1])].numpy()
        frame = cv2.imdecode(coded, cv2.IMREAD_COLOR) if 0 < len(coded) < MAX_PICTURE else None
        if frame is None or max(frame.shape[:2]) > MAX_SIDE:
            raise UserError("a stored portrait is not an image: the shard is damaged; prepare it again")
        frame = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        if frame.shape[:2] != (size, size):
            frame = cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA)
        frames.append(frame)
    return np.stack(frames)
