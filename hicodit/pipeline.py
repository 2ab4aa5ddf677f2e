"""Pipeline from a silent clip to a waveform.

Axes: B batch, T video frames (25 per second), L = 2 T token frames, K token levels, N samples, J half seconds, H
height, W width, S' side of face crops.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from engine.codec import Codec, load_codec
from engine.cuda_graph import GraphedSteps
from engine.device import as_device, to_device
from engine.errors import UserError
from engine.faces.clip import MAX_SIDE, ArrayFrames, ClipFrames, find_faces, place_face, place_landmarks
from engine.faces.source import CASCADE, FaceSource
from engine.faces.track import FaceError, FaceTrack, add_landmarks
from engine.hub import release_folder
from engine.media.audio import generated_comment, write_wav
from engine.media.ffmpeg import probe
from engine.media.video import iter_video
from engine.precision import convert_matrices, pick_dtype, prepare_inference, uses_int8
from engine.progress import stage
from engine.release import find_codec
from engine.settings import check_seed, make, require_range, with_arguments
from hicodit.conditions.encoders import to_unit_range
from hicodit.conditions.types import FPS, MIN_FRAMES, Conditions, Crops, check_identity, num_expression_windows
from hicodit.generation import capture_graphs, generate, sampling_windows
from hicodit.model import FLOAT32_MODULES, TOKENS_PER_FRAME
from hicodit.people import KnownPeople
from hicodit.settings import BUNDLED, GuidanceScales, SamplerConfig, StreamSettings
from hicodit.system import CODECS, HiCoDiTSystem

if TYPE_CHECKING:
    from hicodit.streaming import SpeechChunk

Video = str | Path | np.ndarray | Tensor  # a file, or frames accepted by `as_frames`
GENERATED = generated_comment("HiCoDiT", "speech")  # metadata comment of files
DECODE_FRAMES = 1500  # token frames that are decoded at once, excluding their context: 30 s


@dataclass(frozen=True, repr=False)
class Speech:
    """Generated speech and what it was generated from.

    Attributes:
        wave: (N,) float32.
        rate: sampling rate in Hz.
        tokens: (K, L).
        crops: mouth and face of the clip.
        expression: (J,) class of each half second.
        evaluations: number of network evaluations, one per guidance branch, step and window.
        remarks: one-line notes about the clip, which are shown with the result.
    """

    wave: np.ndarray
    rate: int
    tokens: np.ndarray
    crops: Crops
    expression: np.ndarray
    evaluations: int = 0
    remarks: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Return a summary without the arrays."""
        levels, length = self.tokens.shape
        remarks = f", remarks={list(self.remarks)}" if self.remarks else ""
        return f"Speech({len(self.wave) / self.rate:.2f} s at {self.rate} Hz, {levels} x {length} tokens{remarks})"

    def save(self, path: str | Path) -> None:
        """Write the speech as 16-bit WAV. The file is written atomically.

        Raises:
            UserError: If the name does not end in .wav, or the file cannot be written.
        """
        write_wav(path, self.wave, self.rate, comment=GENERATED)


class HiCoDiTPipeline:
    """Pipeline that generates speech for silent clips.

    pipeline = HiCoDiTPipeline.from_pretrained()
    speech = pipeline("clip.mp4", seed=0)        # speech.wave (N,) float32, speech.rate
    speech.save("speech.wav")
    one, other = pipeline(["one.mp4", "other.mp4"], seed=[0, 1])  # one batch

    Args:
        system: score network and condition encoders.
        codec: the tokenizer with which the network was trained.
        sampler, guidance: settings for all calls. The attributes may be reassigned.
        device: device of all networks.
        face_source: face detector and landmarks. None: the cascade.
        compile: compile the sampler's steps with `torch.compile`.

    Raises:
        UserError: If network and tokenizer differ in levels, codes or frame rate.
    """

    def __init__(
        self,
        system: HiCoDiTSystem,
        codec: Codec,
        sampler: SamplerConfig,
        guidance: GuidanceScales,
        device: torch.device | str = "cpu",
        face_source: FaceSource | None = None,
        compile: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.graphs = GraphedSteps(device, compile)
        self.system = system.to(self.device).eval()
        self.codec = codec.to(self.device).eval()
        self.sampler = sampler
        self.guidance = guidance
        self.face_source = face_source or FaceSource()
        self.people: KnownPeople | None = None  # people of the training clips
        self.folder: Path | None = None  # release folder, if the pipeline was loaded from one
        self.codec_folders: dict[str, str | Path] = {}  # folder of the tokenizer, by the name in the release
        config = system.model.config
        rate = TOKENS_PER_FRAME * FPS
        if (config.levels, config.codes, rate) != (codec.levels, codec.codes, codec.frame_rate):
            raise UserError(
                f"the tokenizer has {codec.levels} levels of {codec.codes} codes at {codec.frame_rate:g} Hz, the model "
                f"{config.levels} of {config.codes} at {rate:g} Hz: use the tokenizer with which the model was trained"
            )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path = BUNDLED,
        device: torch.device | str = "cpu",
        codec: str | Path | None = None,
        encoders: str | None = None,
        face_source: FaceSource | None = None,
        precision: str = "auto",
        compile: bool = False,
    ) -> HiCoDiTPipeline:
        """Load a release folder or a release on the hub (OWNER/NAME).

        The tokenizer is searched in the folder, next to it, among the bundled ones, and at its path during training.
        `codec` overrides it.

        Args:
            encoders: folder with the checkpoints of upstream encoders, if different from training.
            face_source: face detector and landmarks. None: those of the training shards.
            precision: precision of the score network: auto, fp32, bf16 or int8; see `engine.precision`.
            compile: compile the sampler's steps with `torch.compile`, which takes minutes when they first run.

        Raises:
            UserError: If a folder is missing, belongs to another model or has wrong shapes, or if the package of the
                face detector is not installed.
        """
        device = as_device(device)
        dtype = pick_dtype(precision, device)
        int8 = uses_int8(precision, device, compile)
        folder = release_folder(folder)
        system = HiCoDiTSystem.from_pretrained(folder, encoders=encoders)
        config = system.release
        if face_source is None:
            face_source = FaceSource.from_name((config.get("features") or {}).get("face", CASCADE), folder)
        if not system.encoders.learns:
            system.encoders.expected = dict(config.get("features") or {})
        if codec is None:
            codec = find_codec(folder, config.get("codec", "rvq_speech"), CODECS, BUNDLED.parent)
        tokenizer = load_codec(codec, CODECS)
        if config.get("token_digest") not in (None, tokenizer.digest()):
            raise UserError(
                f"codec={codec} produces other tokens than {folder} was trained on: use the tokenizer of the model"
            )
        try:
            sampler = make(SamplerConfig, config.get("sampler") or {}, "sampler.")
            guidance = make(GuidanceScales, config.get("guidance") or {}, "guidance.")
        except UserError as error:
            raise UserError(f"{Path(folder) / 'config.yaml'}: {error}") from error
        prepare_inference(convert_matrices(system.model, dtype, FLOAT32_MODULES), int8, device, compile)
        pipeline = cls(system, tokenizer, sampler, guidance, device, face_source, compile)
        pipeline.folder = folder
        pipeline.people = KnownPeople.from_release(Path(folder))
        pipeline.codec_folders = {Path(config.get("codec", "rvq_speech")).name: codec}
        return pipeline

    def push_to_hub(self, repository: str, license: str | None = None, private: bool = False) -> str:
        """Publish the loaded release with its tokenizer on the Hugging Face hub. Return its URL.

        Args:
            repository: OWNER/NAME.
            license: licence of the weights, such as apache-2.0. None: the licence in the model card.
        """
        from engine.publish import publish

        return publish(self.folder, self.codec_folders, repository, license, private)

    def crops(self, video: Video, face: str | int = "largest", face_box: Any = None) -> Crops:
        """Return the crops of one face. See `all_crops` for the arguments."""
        return next(self.all_crops(video, face, face_box))

    def all_crops(
        self,
        video: Video,
        face: str | int = "all",
        face_box: Any = None,
        strips: Sequence[Path] | None = None,
    ) -> Iterator[Crops]:
        """Detect the faces in a clip and crop mouth and face of each.

        Args:
            video: a file of any size and frame rate, or frames at 25 fps, see `as_frames`.
            face: selection among several faces; see `engine.faces.track.follow_faces`.
            face_box: position of the face instead of detection, in pixels of the clip as shown by a player; see
                `engine.faces.track.track_of_boxes`.
            strips: PNG file for a visualisation of the track of each face. A JSON file with the track is written next
                to it.

        Raises:
            UserError: If the video is not readable or shorter than 0.2 s, or no face is found.
        """
        name = Path(video).name if isinstance(video, str | Path) else "the clip"
        for path, (frames, track) in zip(strips or repeat(None), self.track_faces(video, face, face_box)):
            with stage(f"{name}: cutting out the face", len(track), "frames"):
                crops = self.crop_track(frames, track, path)
            if path is not None:
                from engine.faces.strip import write_faces
                from hicodit.conditions.align import MOUTH_SIDE, mouth_poses

                track = track.scaled(frames.display_size[1] / frames.size[1])
                write_faces(path.with_suffix(".json"), track, mouth_poses(track.best_points), MOUTH_SIDE, FPS)
            yield crops

    def track_faces(
        self, video: Video, face: str | int = "largest", face_box: Any = None
    ) -> Iterator[tuple[ClipFrames, FaceTrack]]:
        """Yield the frames of a clip, large enough for the crops, and the track with landmarks of each selected face.

        See `all_crops` for the arguments.
        """
        if isinstance(video, str | Path):
            name = str(video)
            frames = ClipFrames(video, FPS)
            length = round(probe(video).seconds * FPS)
        else:
            name = "the clip"
            array = as_frames(video)
            frames = ArrayFrames(array)
            length = len(array)
        label = f"{Path(name).name} ({length / FPS:.1f} s)" if length else Path(name).name
        try:
            with stage(f"{label}: finding the face", length or None, "frames"):
                tracks = self._find_tracks(frames, name, face, face_box)
        except FaceError as error:
            raise FaceError(f"{name}: {error}") from error
        for track in tracks:
            frames_of_face, track = frames.sharper(track)
            if callable(self.face_source.landmarks):
                with stage(f"{label}: finding the landmarks", len(track), "frames"):
                    track = add_landmarks(frames_of_face, track, self.face_source.landmarks)
            yield frames_of_face, track

    def _find_tracks(self, frames: ClipFrames, name: str, face: str | int, face_box: Any) -> list[FaceTrack]:
        """Return the tracks of the selected faces: from a landmark file, from `face_box`, or by the detector."""
        landmarks = self.face_source.landmarks
        if isinstance(landmarks, Path):
            if face_box is not None:
                raise UserError("face_box and a landmark file both set the position of the face: use only one of them")
            from engine.faces.landmarks import read_landmarks  # most sources have no landmarks

            tracks = [place_landmarks(frames, *read_landmarks(landmarks, Path(name).name), FPS)]
        elif face_box is not None:
            tracks = [place_face(frames, face_box, FPS)]
        else:
            tracks = find_faces(frames, FPS, face, self.face_source.detector)
        count = len(tracks[0])
        if count < MIN_FRAMES:
            raise FaceError(f"{count / FPS:.2f} s of video; at least {MIN_FRAMES / FPS:.1f} s is needed")
        return tracks

    @torch.inference_mode()
    def crop_track(self, blocks: Iterable[np.ndarray], track: FaceTrack, strip: str | Path | None = None) -> Crops:
        """Crop mouth and face from blocks of frames (n, H, W, 3), and classify the expression.

        Args:
            strip: file for the visualisation of the track.
        """
        config = self.system.encoders.config
        mouth = None
        voice_faces = []
        probabilities = []
        start = 0
        every = config.picture_every
        chosen = self.system.voice_face_indices(len(track))
        drawing = None
        if strip is not None:
            from engine.faces.strip import Strip

            drawing = Strip(track, FPS)
        for block in blocks:
            mouths = config.crop_mouth(block, track, start)
            if mouth is None:
                mouth = np.empty((len(track), *mouths.shape[1:]), mouths.dtype)
            mouth[start : start + len(block)] = mouths
            first = -(-start // every)  # index of the first face crop of the block
            index = np.arange(first * every - start, len(block), every)
            if len(index):
                pictures = config.crop_faces(block[index], track[start + index])
                probabilities.append(self.system.read_expressions(torch.from_numpy(pictures).movedim(-1, 1)))
                voice_faces.append(pictures[[n - first for n in chosen if first <= n < first + len(index)]])
            if drawing is not None:
                drawing.add(block, mouths, start)
            start += len(block)
        if drawing is not None:
            drawing.write(strip)
        expression = self.system.window_classes(torch.cat(probabilities), len(track))
        return Crops(mouth, np.concatenate(voice_faces), expression, track)

    @torch.inference_mode()
    def conditions(self, crops: Sequence[Crops], identity: np.ndarray | None = None) -> Conditions:
        """Encode the conditions of a batch of clips. `identity` (256,) is the GE2E embedding of a reference voice for
        all clips.
        """

        def padded(part: str) -> Tensor:
            return to_device(pad_sequence([torch.as_tensor(getattr(c, part)) for c in crops], True), self.device)

        frames = torch.tensor([len(c) for c in crops])
        system = self.system
        lip = system.encoders.lip(padded("mouth"), frames)
        if identity is None:
            faces = padded("voice_faces").movedim(-1, 2)  # (B, 4, 3, S', S')
            voice = system.model.adapt_identity(system.encoders.identity(to_unit_range(faces)))
        else:
            voice = to_device(torch.as_tensor(identity, dtype=torch.float32), self.device).expand(len(crops), -1)
        return Conditions(lip, voice, padded("expression"), frames)

    def warm_up(self, batch_size: int) -> None:
        """Capture the CUDA graphs of batches of up to `batch_size` clips. Without a GPU this does nothing."""
        capture_graphs(self.system.model, self.sampler, self.guidance, self.graphs, batch_size)

    @torch.inference_mode()
    def decode(self, tokens: Sequence[Tensor]) -> list[np.ndarray]:
        """Decode tokens (K, L) to waveforms (N,). Clips of equal length form batches; long clips are decoded in
        chunks.
        """
        waves: dict[int, np.ndarray] = {}
        clips_of: dict[int, list[int]] = {}  # clips by length
        for clip, each in enumerate(tokens):
            clips_of.setdefault(each.shape[1], []).append(clip)
        for length, clips in clips_of.items():
            size = max(1, DECODE_FRAMES // length)
            for start in range(0, len(clips), size):
                chosen = clips[start : start + size]
                batch = torch.stack([tokens[clip] for clip in chosen])
                if length > DECODE_FRAMES:
                    parts = self.codec.decode_stream(batch.split(DECODE_FRAMES, 2), 2)
                else:
                    parts = [self.codec.decode(batch)]
                decoded = torch.cat([part[:, 0].clamp(-1, 1).cpu() for part in parts], 1)
                waves |= zip(chosen, decoded.numpy())
        return [waves[clip] for clip in range(len(tokens))]

    def run(
        self,
        crops: Sequence[Crops],
        seeds: Sequence[int],
        identity: np.ndarray | None = None,
        sampler: SamplerConfig | None = None,
    ) -> list[Speech]:
        """Generate the speech of a batch of clips from their crops.

        Args:
            crops: crops of each clip.
            seeds: one per clip.
            identity: (256,) GE2E embedding of a voice, instead of those predicted from the faces.
            sampler: settings that replace those of the pipeline.

        Raises:
            UserError: If a seed or the identity is invalid.
        """
        sampler = sampler or self.sampler
        if not crops:
            return []
        check_identity(identity)
        seeds = _checked_seeds(seeds, len(crops))
        model = self.system.model
        with stage("conditions"):
            conditions = self.conditions(crops, identity)
        frames = [len(clip) for clip in crops]
        steps_of_clips = Counter[int]()
        steps = sampler.steps * max(len(sampling_windows(n, sampler)) for n in frames)
        with stage(f"sampling {sum(frames) / FPS:.1f} s of speech", steps, "steps") as progress:

            def on_step(clips: Sequence[int]) -> None:
                progress()
                steps_of_clips.update(clips)

            tokens = generate(model, conditions, sampler, self.guidance, seeds, on_step, self.graphs)
        with stage("decoding"):
            waves = self.decode(tokens)
        classes = conditions.expression.cpu().numpy()
        branches = len(self.guidance.branches)
        return [
            Speech(
                wave,
                self.codec.sample_rate,
                tokens[i].numpy(),
                crops[i],
                classes[i, : num_expression_windows(frames[i])],
                branches * steps_of_clips[i],
                self.remarks(crops[i]),
            )
            for i, wave in enumerate(waves)
        ]

    def remarks(self, crops: Crops) -> tuple[str, ...]:
        """Return one-line notes about a clip, which are shown with its result. They are not errors."""
        remarks = []
        if crops.track is not None and (unseen := crops.track.unseen(FPS)):
            remarks.append(f"face seen in {crops.track.coverage:.0%}; not at {unseen}")
        if self.people is not None and (unlike := self.people.remark(crops.voice_faces)):
            remarks.append(unlike)
        return tuple(remarks)

    def stream(
        self,
        frames: str | Path | Iterable[np.ndarray],
        seed: int = 0,
        identity: np.ndarray | None = None,
        **settings: object,
    ) -> Iterator[SpeechChunk]:
        """Yield audio in hops of 160 ms while frames arrive. The concatenated chunks are the speech of the clip.

        Args:
            frames: a video file, or frames (H, W, 3) or blocks of them (n, H, W, 3), uint8 RGB, 25 per second.
            settings: fields of `hicodit.settings.StreamSettings`, such as `lookahead=0.8`.
        """
        from hicodit.streaming import HOP, SpeechStream

        chosen = with_arguments(StreamSettings(), settings, ("seed", "identity"))
        stream = SpeechStream(self, chosen, seed, identity)
        blocks = iter_video(frames, FPS, MAX_SIDE, HOP) if isinstance(frames, str | Path) else frames
        for block in blocks:
            for frame in block[None] if block.ndim == 3 else block:
                if chunk := stream.push(frame):
                    yield chunk
        if chunk := stream.finish():
            yield chunk

    def __call__(
        self,
        video: Video | Sequence[Video],
        seed: int | Sequence[int] = 0,
        identity: np.ndarray | None = None,
        fps: float | None = None,
        **sampler: object,
    ) -> Speech | list[Speech]:
        """Generate the speech of a clip, or of a list of clips as one batch.

        Args:
            video: a file of any size and frame rate, or frames accepted by `as_frames`, or a list of these.
            seed: one seed for all clips, or a list with one per clip.
            identity: (256,) GE2E vector of a voice, in place of those of the faces.
            fps: frame rate of frames. Default: 25.
            sampler: fields of `hicodit.settings.SamplerConfig` that override those of the release, as in `steps=16`.

        Returns:
            The speech; for a list of clips, a list.

        Raises:
            UserError: See `all_crops`; also if an argument is invalid.
        """
        settings = with_arguments(self.sampler, sampler, ("seed", "identity", "fps"))
        is_batch = isinstance(video, list | tuple)
        videos = list(video) if is_batch else [video]
        if isinstance(seed, np.ndarray | Tensor):
            seed = seed.tolist()
        seeds = list(seed) if isinstance(seed, Sequence) else [seed] * len(videos)
        check_identity(identity)
        seeds = _checked_seeds(seeds, len(videos))
        crops = [self.crops(_at_25_fps(each, fps)) for each in videos]
        speeches = self.run(crops, seeds, identity, settings)
        return speeches if is_batch else speeches[0]


def _checked_seeds(seeds: Sequence[int], clips: int) -> list[int]:
    """Return the seeds as Python's integers, which PyTorch's generators need.

    Raises:
        UserError: If there is not one seed per clip, or a seed is invalid.
    """
    if len(seeds) != clips:
        raise UserError(f"{len(seeds)} seeds for {clips} clips: expected one for all, or one per clip")
    for seed in seeds:
        check_seed(seed)
    return [int(seed) for seed in seeds]


def as_frames(video: np.ndarray | Tensor) -> np.ndarray:
    """Convert frames (T, H, W, 3) or (T, 3, H, W), uint8 RGB, to an array (T, H, W, 3).

    Raises:
        UserError: If the shape or dtype is not supported.
    """
    frames = video.detach().cpu().numpy() if isinstance(video, Tensor) else video
    if not isinstance(frames, np.ndarray):
        raise UserError(f"unsupported clip of type {type(video).__name__}: expected a file, an array or a tensor")
    if frames.ndim == 4 and frames.shape[-1] != 3 and frames.shape[1] == 3:
        frames = np.moveaxis(frames, 1, -1)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        given = f"frames of shape {frames.shape} and type {frames.dtype}"
        raise UserError(f"{given}: expected (T, H, W, 3) or (T, 3, H, W) uint8 RGB")
    return np.ascontiguousarray(frames)


def _at_25_fps(video: Video, fps: float | None) -> Video:
    """Repeat or drop the frames of a clip to obtain 25 frames per second. Files are returned unchanged."""
    if fps is None:
        return video
    if isinstance(video, str | Path):
        raise UserError(f"fps={fps:g} only applies to frames: {video} states its frame rate")
    require_range("fps", fps, 1.0, 1000.0)
    frames = as_frames(video)
    count = max(1, round(len(frames) / fps * FPS))
    times = (np.arange(count) + 0.5) / FPS
    return frames[np.minimum((times * fps).astype(int), len(frames) - 1)]
