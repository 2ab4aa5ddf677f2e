"""Quality of a portrait codec on real people: self-reenactment and cross-reenactment.

Faces are cropped as in inference. In self-reenactment, the clip is reconstructed from its first frame and its
motion codes; in cross-reenactment, the motion codes of one person's clip move the first frame of another's. The opening
of the mouth is read from dlib's landmarks of the inner lips, in units of the distance of the eyes; `identity` is the
cosine of embeddings of dlib's face recognition network, on which nothing here was trained (extra `landmarks`). For the
cosine's scale, `same_person` compares two clips of one person, `other_people` clips of two. The codec `copy` repeats
the first frame.

With --drawn, held-out cartoon faces of a synthetic corpus are reconstructed, too: from their own motion codes and from
those of the codec named by --codes, as for a model that generates those codes.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from corpora.preparation.sources import evenly_spaced
from corpora.synthetic.mouth_opening import MouthReader
from engine.arguments import within
from engine.errors import UserError
from engine.evaluation.resynthesis import rebuild
from engine.evaluation.validation import Share
from engine.faces.landmarks import load_face_recogniser
from engine.files import atomic_output, find_files
from engine.media.pictures import fit_frames, identity_to_tensor, to_bytes, video_to_tensor
from engine.metrics.lips import LandmarkReader, enlarge, mouth_opening, points_of
from engine.metrics.picture import reconstruction
from lia_x.codec import LiaX
from lia_x.data import held_out_frames
from talker_t2av.faces import find_square, read_square

COPY = "copy"
EVERY = 10  # frames from one embedding to the next


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--codecs", nargs="+", default=["assets/lia_x_real"], help=f"releases of LIA-X, or {COPY}")
    parser.add_argument(
        "--people", nargs="*", type=Path, default=[], help="folders of .mpg or .mp4 clips, one for each person"
    )
    parser.add_argument("--clips", type=within(1), default=4, help="number of clips per person, evenly spaced by name")
    parser.add_argument("--drawn", type=Path, help="synthetic corpus")
    parser.add_argument("--drawn-clips", type=within(1), default=8, help="number of clips per held-out split")
    parser.add_argument("--codes", help="release whose motion codes of cartoon faces are decoded, too")
    parser.add_argument("--sheets", type=Path, help="folder for images of ground-truth and reconstructed frames")


def run(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    if not args.people and not args.drawn:
        raise UserError("nothing to measure: set --people FOLDER ..., --drawn CORPUS, or both")
    judge = Judge() if args.people else None
    people = {folder.name: [judge.read(path) for path in clips_of(folder, args.clips)] for folder in args.people}
    if len(people) > 1 and min(map(len, people.values())) > 1:
        result = {"same_person": _cosine(people, 0, 1), "other_people": _cosine(people, 1, 0)}
        yield result, "identity, ground-truth clips: " + _line(result)
    for name in args.codecs:
        codec = Copy() if name == COPY else LiaX.from_pretrained(name).to(args.device)
        for result in chain(_self(codec, people, judge, args), _cross(codec, people, judge), _drawn(codec, args)):
            yield {"codec": name, **result}, f"{name}, {result['what']}: {_line(result)}"


def clips_of(folder: Path, count: int) -> list[Path]:
    """Return `count` clips in or below a folder, evenly spaced by name, or all clips if there are fewer."""
    files = find_files(folder, ".mpg", ".mp4")
    if not files:
        raise UserError(f"--people {folder} contains no .mpg or .mp4 files")
    return [folder / file for file in evenly_spaced(files, count)]


@dataclass
class Seen:
    """Inputs of the metrics: frames (T, 128, 128, 3), mouth opening (T,), face embeddings (E, 128) of unit length."""

    frames: np.ndarray
    box: Any
    opening: np.ndarray
    faces: np.ndarray


class Copy:
    """A baseline codec that repeats the first frame."""

    size = 128


class Judge(LandmarkReader):
    """dlib's landmarks and face recognition, which measure mouth opening and identity."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = load_face_recogniser()

    def read(self, path: Path) -> Seen:
        square = find_square(path, 75)
        frames = fit_frames(np.concatenate(list(read_square(path, square, 10**6))), Copy.size)
        try:
            box = self.find(enlarge(frames[0]))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        return Seen(frames, box, *self.look(frames, box))

    def look(self, frames: np.ndarray, box: Any) -> tuple[np.ndarray, np.ndarray]:
        """Measure the opening (T,) and embeddings (E, 128) in frames (T, S, S, 3), in the first of which the face is in
        `box`.
        """
        shapes = self.shapes(frames, box)
        faces = []
        for number in range(EVERY // 2, len(frames), EVERY):
            face = np.array(self.embed.compute_face_descriptor(enlarge(frames[number]), shapes[number]))
            faces.append(face / np.linalg.norm(face))
        return mouth_opening(np.stack([points_of(shape) for shape in shapes])), np.array(faces)


def _made(codec: LiaX | Copy, frames: np.ndarray, face: np.ndarray | None = None) -> np.ndarray:
    if isinstance(codec, Copy):
        return np.repeat((frames[0] if face is None else face)[None], len(frames), 0)
    return rebuild(codec, frames, face)


def _self(codec, people, judge, args) -> Iterator[dict[str, Any]]:
    for person, clips in people.items():
        found = defaultdict(list)
        for number, clip in enumerate(clips):
            made = _made(codec, clip.frames)
            opening, faces = judge.look(made, clip.box)
            figures = reconstruction(clip.frames, made)
            figures["opening"] = correlation(clip.opening, opening)
            figures["identity"] = float((clip.faces * faces).sum(1).mean())
            for name, value in figures.items():
                found[name].append(value)
            if args.sheets and number == 0:
                name = "copy" if isinstance(codec, Copy) else codec.digest()
                write_sheet(args.sheets / f"{name}-{person}.png", clip.frames, made)
        yield {"what": f"self-reenactment of {person}", **_means(found)}


def _cross(codec, people, judge) -> Iterator[dict[str, Any]]:
    found = defaultdict(list)
    names = list(people)
    for driver, other in zip(names, names[1:] + names[:1]):
        for driving, shown in islice(zip(people[driver], people[other]), 2):
            if driver == other:
                continue
            opening, faces = judge.look(_made(codec, driving.frames, shown.frames[0]), shown.box)
            found["opening"].append(correlation(driving.opening, opening))
            found["identity"].append(float((faces @ shown.faces.T).mean()))
            found["identity_of_driver"].append(float((faces @ driving.faces.T).mean()))
    if found:
        yield {"what": "cross-reenactment", **_means(found)}


def _drawn(codec, args) -> Iterator[dict[str, Any]]:
    if not args.drawn:
        return
    reader = MouthReader()
    earlier = LiaX.from_pretrained(args.codes).to(args.device) if args.codes else None
    for split in ("seen", "unseen"):
        found = defaultdict(list)
        for _, frames in held_out_frames(args.drawn, split, args.drawn_clips, codec.size, Share()):
            made = _made(codec, frames)
            for name, value in reconstruction(frames, made).items():
                found[name].append(value)
            found["opening"].append(correlation(reader(frames), reader(made)))
            if earlier is not None and isinstance(codec, LiaX):
                video = video_to_tensor(frames, codec.size)
                codes = earlier.encode(video)
                own = codec.encode(video)
                shown = to_bytes(codec.decode(codes, identity_to_tensor(frames[0], codec.size)))
                found["psnr_of_codes"].append(reconstruction(frames, shown)["psnr"])
                found["opening_of_codes"].append(correlation(reader(frames), reader(shown)))
                found["code_error"].append(float(((own - codes).square().mean() / codes.var(0).mean()).sqrt()))
        yield {"what": f"cartoon faces, {split}", **_means(found)}


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Pearson's correlation of two series (T,); 0 if one of them is constant."""
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else 0.0


def _cosine(people: dict[str, list[Seen]], person: int, clip: int) -> float:
    """Return the mean cosine between the first clip of each person and clip `clip` of the person `person` positions
    later.
    """
    clips = list(people.values())
    pairs = [(own[0], clips[(k + person) % len(clips)][clip]) for k, own in enumerate(clips)]
    return float(np.mean([(a.faces @ b.faces.T).mean() for a, b in pairs]))


def _means(found: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(float(np.mean(values)), 4) for name, values in found.items()}


def _line(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in result.items() if name != "what")


def write_sheet(path: Path, true: np.ndarray, made: np.ndarray) -> None:
    """Write an image of 32 ground-truth frames, with the reconstructed frames below them, at three times the size."""
    at = np.linspace(0, len(true) - 1, 32).round().astype(int)
    rows = [np.concatenate([np.concatenate(list(f[k]), 1) for f in (true, made)]) for k in at.reshape(-1, 8)]
    sheet = cv2.resize(np.concatenate(rows), None, fx=3, fy=3, interpolation=cv2.INTER_CUBIC)
    with atomic_output(path) as partial:
        partial.write_bytes(cv2.imencode(".png", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))[1].tobytes())
