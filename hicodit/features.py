"""Features of a corpus, made once: crops, GE2E embeddings and RVQ tokens, in shards of safetensors.

Axes: T video frames of all clips of a shard in a row, L = 2 T token frames, n clips of a shard, F face pictures a clip.

FEATURES/SPLIT/visual-00000.safetensors: mouth (T, S, S) uint8, faces (n, F, S', S', 3) uint8, ge2e (n, 256), expression
(n,) uint8, phoneme (T,) uint8 (0 is silence), frames (n,) int32. FEATURES/SPLIT/tokens-DIGEST-00000.safetensors: tokens
(L, K) int16 of the tokenizer with that digest. Visual shards do not depend on the tokenizer, so a new one costs little.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.codec import Codec
from engine.errors import UserError
from engine.faces.clip import find_face
from engine.files import atomic_output
from engine.media.audio import read_audio
from engine.media.corpus import read_manifest
from engine.media.video import read_video
from engine.metrics.speaker import GE2EEncoder
from hicodit.conditions.released import EncoderConfig
from hicodit.conditions.types import EXPRESSIONS

SHARD_CLIPS = 200
FACE_PICTURES = 4
FPS = 25.0


def shard_count(corpus: Path, split: str) -> int:
    return -(-len(read_manifest(corpus, split)) // SHARD_CLIPS)


def shard_is_made(corpus: Path, split: str, index: int, out: Path, symbols: list[str], codec: Codec | None) -> bool:
    """Whether a shard holds just the clips and phonemes that it should, and its tokens too if a tokenizer is given."""
    listing = out / split / f"visual-{index:05d}.json"
    if not listing.is_file():
        return False
    made = json.loads(listing.read_text())
    wanted = {clip["id"] for clip in read_manifest(corpus, split)[index * SHARD_CLIPS : (index + 1) * SHARD_CLIPS]}
    held = {clip["id"] for clip in made["clips"]} | {name for name, _ in made["skipped"]}
    if held != wanted or made["symbols"] != symbols:
        return False
    return codec is None or (out / split / f"tokens-{codec.digest()}-{index:05d}.safetensors").is_file()


def drop_shards_beyond(corpus: Path, split: str, out: Path) -> int:
    """Delete the shards that a corpus has had when it was larger, or training would go on with them; gives how many."""
    count, dropped = shard_count(corpus, split), 0
    for path in (out / split).glob("visual-*.safetensors"):
        number = path.stem.removeprefix("visual-")
        if int(number) >= count:
            for part in (path, path.with_suffix(".json"), *path.parent.glob(f"tokens-*-{number}.safetensors")):
                part.unlink(missing_ok=True)
            dropped += 1
    return dropped


def phoneme_labels(phonemes: list, frames: int, symbols: list[str]) -> np.ndarray:
    """Index (T,) of the phoneme at each frame's centre, counted from 1 in `symbols`; 0 where none sounds."""
    labels = np.zeros(frames, np.uint8)
    for symbol, start, end in phonemes:
        if symbol in symbols:
            first, last = (int(np.ceil(t * FPS - 0.5)) for t in (start, end))
            labels[max(first, 0) : max(last, 0)] = symbols.index(symbol) + 1
    return labels


def make_visual_shard(
    corpus: Path, split: str, index: int, out: Path, encoders: EncoderConfig, symbols: list[str]
) -> list[tuple[str, str]]:
    """Write one visual shard (unless it is there); returns (clip, reason) of clips that had to be left out."""
    path = out / split / f"visual-{index:05d}.safetensors"
    listing = path.with_suffix(".json")
    if shard_is_made(corpus, split, index, out, symbols, None):
        return [tuple(pair) for pair in json.loads(listing.read_text())["skipped"]]
    for stale in (listing, *listing.parent.glob(f"tokens-*-{index:05d}.safetensors")):
        stale.unlink(missing_ok=True)
    speaker = GE2EEncoder()
    kept, skipped = [], []
    columns = {name: [] for name in ("mouth", "faces", "ge2e", "expression", "phoneme", "frames")}
    for clip in read_manifest(corpus, split)[index * SHARD_CLIPS : (index + 1) * SHARD_CLIPS]:
        try:
            frames = read_video(corpus / split / f"{clip['id']}.mp4", FPS)
            track = find_face([frames], FPS)
            ge2e = speaker.embed(read_audio(corpus / split / f"{clip['id']}.wav", 16_000), 16_000)
        except UserError as error:
            skipped.append((clip["id"], str(error)))
            continue
        pictures = np.linspace(0, len(frames) - 1, FACE_PICTURES + 2).round().astype(int)[1:-1]
        faces = encoders.cut_faces(frames[pictures], track[pictures])
        columns["mouth"].append(encoders.cut_mouth(frames, track))
        columns["faces"].append(faces[None])
        columns["ge2e"].append(np.asarray(ge2e, np.float32)[None])
        columns["expression"].append(np.array([EXPRESSIONS.index(clip["expression"])], np.uint8))
        columns["phoneme"].append(phoneme_labels(clip["phonemes"], len(frames), symbols))
        columns["frames"].append(np.array([len(frames)], np.int32))
        kept.append({"id": clip["id"], "text": clip["text"], "voice": clip["voice"]})
    if not kept:
        raise UserError(f"no clip of {corpus / split} could be used; the first: {skipped[0][0]}: {skipped[0][1]}")
    tensors = {name: torch.from_numpy(np.concatenate(parts)) for name, parts in columns.items()}
    with atomic_output(path) as partial:
        save_file(tensors, partial)
    with atomic_output(listing) as partial:
        partial.write_text(json.dumps({"clips": kept, "skipped": skipped, "symbols": symbols}))
    return skipped


@torch.no_grad()
def make_token_shard(corpus: Path, split: str, index: int, out: Path, codec: Codec) -> None:
    """Write the tokens of the clips of one visual shard (unless they are there)."""
    path = out / split / f"tokens-{codec.digest()}-{index:05d}.safetensors"
    if path.is_file():
        return
    clips = json.loads((out / split / f"visual-{index:05d}.json").read_text())["clips"]
    frames = load_file(out / split / f"visual-{index:05d}.safetensors")["frames"].tolist()
    tokens = []
    for clip, count in zip(clips, frames):
        wave = torch.from_numpy(read_audio(corpus / split / f"{clip['id']}.wav", codec.sample_rate))
        samples = count * codec.sample_rate // int(FPS)
        wave = torch.nn.functional.pad(wave, (0, max(0, samples - len(wave))))[:samples]
        codes = codec.encode(wave[None, None])[0]  # (K, L)
        assert codes.shape[1] == 2 * count, (codes.shape, count)
        tokens.append(codes.T.to(torch.int16))
    with atomic_output(path) as partial:
        save_file({"tokens": torch.cat(tokens)}, partial)


@dataclass(frozen=True)
class Clip:
    """One clip's features: mouth (T, S, S) uint8, faces (F, S', S', 3) uint8, tokens (2 T, K), and labels."""

    mouth: Tensor
    faces: Tensor
    tokens: Tensor
    ge2e: Tensor
    expression: int
    phoneme: Tensor
    info: dict


class FeatureSplit:
    """All shards of a split, memory-mapped."""

    def __init__(self, folder: str | Path, digest: str) -> None:
        folder = Path(folder)
        paths = sorted(folder.glob("visual-*.safetensors"))
        if not paths:
            raise UserError(f"no features in {folder}: make them with python scripts/prepare_features.py")
        self.shards, self.places = [], []
        for number, path in enumerate(paths):
            tokens = path.with_name(path.name.replace("visual-", f"tokens-{digest}-"))
            if not tokens.is_file():
                raise UserError(
                    f"no tokens of tokenizer {digest} at {tokens}: run python scripts/prepare_features.py again"
                )
            shard = load_file(path) | load_file(tokens)
            shard["info"] = json.loads(path.with_suffix(".json").read_text())["clips"]
            shard["ends"] = torch.cumsum(shard["frames"].long(), 0).tolist()
            self.shards.append(shard)
            self.places += [(number, i) for i in range(len(shard["info"]))]
        self.frames = torch.cat([shard["frames"] for shard in self.shards]).long()

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Clip:
        number, i = self.places[index]
        shard = self.shards[number]
        end, start = shard["ends"][i], shard["ends"][i] - int(shard["frames"][i])
        return Clip(
            mouth=shard["mouth"][start:end],
            faces=shard["faces"][i],
            tokens=shard["tokens"][2 * start : 2 * end].long(),
            ge2e=shard["ge2e"][i],
            expression=int(shard["expression"][i]),
            phoneme=shard["phoneme"][start:end].long(),
            info=shard["info"][i],
        )
