"""Talker-T2AV's training task: losses, validation with a recogniser, and release.

Axes: B batch, T frames, Ds / Dm speech / motion channels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.errors import UserError
from engine.evaluation.validation import ByClip, Share, measure_outputs
from engine.media.audio import write_wav
from engine.media.pictures import identity_to_tensor, to_bytes
from engine.media.video import write_video
from engine.release import load_strict
from engine.seeding import generator_for
from engine.settings import require_range
from engine.shards.recordings import spread
from engine.shards.source import join, read_json
from engine.training import distributed
from engine.training.task import ReleaseInfo, Task
from talker_t2av import upstream
from talker_t2av.alignment import Alignment
from talker_t2av.data import STAGES, TalkerExamples
from talker_t2av.faces import find_square, read_square
from talker_t2av.generation import BatchedDecoder, Result
from talker_t2av.layers import Block
from talker_t2av.losses import count_elements, phoneme_loss, training_forward, training_losses
from talker_t2av.model import FPS, TalkerConfig, TalkerT2AV
from talker_t2av.particles import unsupported_reason
from talker_t2av.request import MODES, Request, Sampling
from talker_t2av.system import MotionStats, check_codecs, load_model, load_motion, load_speech
from talker_t2av.text import TalkerTokenizer, load_tokenizer

NEW_WEIGHTS = re.compile(r"^head_phoneme\.")  # tensors of auxiliary losses, which `init` may not contain
# clips per split whose files a validation saves
WAVES = 4
VIDEOS = 2


class TalkerTask(Task):
    """Trains flow matching of speech and motion patches, and the stop head, on precomputed latents.

    A model trained for T2AV also supports A2V and V2A, as in training the backbone receives both ground-truth streams,
    like a given stream in inference. A patch is then generated before the given patch of the same time is input.

    Args:
        model: fields of `TalkerConfig`.
        codecs: release folders `speech`, `motion`, `speaker` with which the latents were computed. `motion` may be None
            for TTS. The release stores their names; validation decodes with the first.
        stats: path or URL of the training shards' index.json, with the motion statistics. None: those of the released
            model.
        tokenizer: see `load_tokenizer`.
        init: initial model with the same sizes and tokenizer: a release folder, or a folder with the upstream files.
        guided_layers: layers of the backbone with a head that is trained to attend to the current text position; see
            `alignment`. Requires data.train.phonemes.
        head_fraction: fraction of the patches on which the diffusion heads are trained per step. The heads dominate the
            cost of a step, while the auxiliary losses train the backbone on every patch.
        warm_start: `qwen` (a folder of Qwen3-0.6B), `tts` or `projector` (folders of safetensors), `qwen` first; see
            `upstream.warm_start`.
        freeze_embeddings: do not train the word embeddings.
        sampling: fields of `Sampling`, the defaults stored in the release; `particles` only if the model supports them.
        validation: `root` of prepared shards, `splits`, and `clips` of each to synthesise; `metrics`: figures of
            `engine.metrics.registry`; `grammar`: recogniser, see `words_by`; `corpus`: folder of the recordings, whose
            faces are then rendered, or None. None disables validation.
        recipe: description of the recipe for the model card.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        codecs: Mapping[str, str],
        stats: str | None = None,
        tokenizer: str | Mapping[str, str] | None = None,
        init: str | None = None,
        guided_layers: Sequence[int] = (),
        head_fraction: float = 1.0,
        warm_start: Mapping[str, str] | None = None,
        freeze_embeddings: bool = False,
        sampling: Mapping[str, Any] | None = None,
        validation: Mapping[str, Any] | None = None,
        recipe: str = "",
    ) -> None:
        super().__init__()
        self.model = TalkerT2AV(TalkerConfig(**model))
        self.sampling = Sampling(**(sampling or {}))
        self.validation = validation
        self.recipe = recipe
        if unsupported_reason(self.model):
            self.sampling = replace(self.sampling, particles=1)
        if distributed.is_main():
            check_codecs(codecs)
        start = load_model(init) if init else None
        self.words = load_tokenizer(tokenizer)
        rows = self.model.llm.config.vocab_size
        if self.words.vocab_size > rows:
            raise UserError(
                f"task.model.llm.vocab_size={rows} must be at least {self.words.vocab_size} for this tokenizer"
            )
        self.guided_layers = guided_layers
        self.head_fraction = head_fraction
        layers = self.model.llm.config.num_hidden_layers
        if any(not 0 <= layer < layers for layer in guided_layers):
            raise UserError(f"task.guided_layers={list(guided_layers)}: layers must be from 0 to {layers - 1}")
        require_range("task.head_fraction", head_fraction, 0.0, 1.0)
        self.codecs = dict(codecs)
        self.tokenizer = tokenizer
        self.stats_file = stats
        self.stats = MotionStats.read(stats)
        made = (read_json(stats).get("digests") or {}) if stats else {}
        self.digests = {stream: made[name] for stream, name in STAGES.items() if made.get(name)}
        channels = self.model.config.motion_dim
        if len(self.stats.mean) != channels:
            raise UserError(f"task.model.motion_dim={channels}, but the motion has {len(self.stats.mean)} channels")
        if start:
            self._start_from(init, *start)
        for kind, folder in sorted((warm_start or {}).items(), key=lambda item: item[0] != "qwen"):
            if folder is None:
                continue
            found = upstream.warm_start(self.model, folder, kind)
            print(f"{len(found)} tensors from {folder}", flush=True)
        if freeze_embeddings:
            self.model.llm.model.embed_tokens.weight.requires_grad_(False)

    def _start_from(self, init: str, start: TalkerT2AV, words: Path) -> None:
        """Load the weights of a model whose tokenizer is in the folder `words`."""
        former = TalkerTokenizer.from_pretrained(words)
        own = self.model.state_dict()
        if former.tokenizer.get_vocab() != self.words.tokenizer.get_vocab():
            raise UserError(
                f"init={init} has another vocabulary than task.tokenizer={self.tokenizer}: use the tokenizer in {words}"
            )
        state = upstream.complete(start.state_dict(), self.model)
        if not self.model.config.phonemes:
            state = {key: value for key, value in state.items() if not key.startswith("head_phoneme.")}
        state |= {key: value for key, value in own.items() if key not in state and NEW_WEIGHTS.search(key)}
        load_strict(self.model, state, f"init={init}")

    on_host = ("attention_mask", "speech_span", "speech_frames", "motion_frames", "pointer")

    def parts(self) -> dict[str, nn.Module]:
        return {"model": self.model}

    def blocks(self) -> list[nn.Module]:
        """Return the layers of the language model, the patch encoders and the diffusion heads."""
        return [*self.model.llm.model.layers, *(m for m in self.model.modules() if isinstance(m, Block))]

    def loss_counts(self, batch: dict[str, Tensor]) -> dict[str, int]:
        return count_elements(self.model.config, batch)

    def tokens(self, batch: dict[str, Tensor]) -> int:
        """Return the number of tokens of the language model."""
        return int(batch["attention_mask"].sum())

    def forward(self, batch: dict[str, Tensor], part: str) -> dict[str, Tensor]:
        """Return the losses of a batch; see `data.collate`."""
        with Alignment(self.model, self.guided_layers if "pointer" in batch else ()) as alignment:
            forward = training_forward(self.model, batch, self.head_fraction if self.training else 1.0)
        losses = training_losses(self.model, forward)
        more = {}
        if "phoneme" in batch and self.model.config.phonemes:
            more["phoneme"] = phoneme_loss(self.model, forward.hidden, batch)
        if alignment.inputs:
            more["alignment"] = alignment.loss(batch, forward.mask, self.model.config)
        losses["loss"] = losses["loss"] + sum(more.values())
        losses |= more
        return losses

    @torch.no_grad()
    def measure(self, folder: Path, share: Share) -> dict[str, float | ByClip]:
        """Measure losses of held-out clips, errors of the utterance length, and WER.

        One process measures the losses, as their random numbers are drawn sequentially.
        """
        if self.validation is None:
            return {}
        results: dict[str, float | ByClip] = {}
        for split in self.validation["splits"]:
            examples = self.held_out_examples(split)
            chosen = spread(len(examples), self.validation["clips"])
            if share.range(len(chosen)):
                figures = self.measure_speech(examples, chosen, folder, share)
                if share.first:
                    losses = self.held_out_losses(examples.load, examples.collate, chosen)
                    figures |= {name if name == "loss" else f"loss_{name}": value for name, value in losses.items()}
                results |= {f"{name}_{split}": value for name, value in figures.items()}
        return results

    def held_out_examples(self, split: str) -> TalkerExamples:
        """Return the examples of a held-out split: with motion, if both the model and the split have it."""
        source = join(self.validation["root"], split)
        moving = self.codecs.get("motion") and read_json(join(source, "index.json")).get("motion_mean")
        c = self.model.config
        sizes = {name: getattr(c, name) for name in ("patch_size", "delay", "order", "phonemes")}
        task = "t2av" if moving else "tts"
        return TalkerExamples(source, task, stats=self.stats_file, tokenizer=self.tokenizer, **sizes)

    def measure_speech(
        self, examples: TalkerExamples, chosen: Sequence[int], folder: Path, share: Share
    ) -> dict[str, ByClip]:
        """Generate the sentences of a share of the held-out clips `chosen`, and measure their length and words.

        The speech of the first clips is written to `folder`, with faces if their recordings are there.
        """
        own = share.range(len(chosen))
        infos = [examples.info(chosen[n]) for n in own]
        items = [examples.load(chosen[n], generator_for(0, "held out", chosen[n])) for n in own]
        moving = examples.task == "t2av"
        requests = [
            Request(
                prompt=examples.words.prompt(info["text"]),
                speaker=item["speaker"],
                speech=item["speech"][:0],
                motion=item["motion"][:0],
                first_motion=item["motion"][0] if moving else None,
                max_patches=2 * -(-len(item["speech"]) // self.model.config.patch_size),
                seed=chosen[n],
            )
            for n, info, item in zip(own, infos, items)
        ]
        spoken = BatchedDecoder(self.model, MODES[examples.task], self.sampling, len(requests)).generate(requests)
        codec = load_speech(self.codecs["speech"]).to(self.model.device)
        waves = [codec.decode(result.speech[None])[0, 0].cpu().numpy() for result in spoken]
        for _, info, wave in zip(range(WAVES)[own.start :], infos, waves):
            write_wav(folder / f"{info['key']}.wav", wave, codec.sample_rate)
        if self.validation.get("corpus") and moving:
            drawn = len(range(VIDEOS)[own.start :])
            self._draw(folder, infos[:drawn], spoken, waves, codec.sample_rate)
        # A sentence may be spoken at another speed, so an error of its length in seconds is not a fault by itself.
        errors = [abs(len(result.speech) - len(item["speech"])) / FPS for result, item in zip(spoken, items)]
        scores = {
            "stopped": ByClip({n: result.stopped for n, result in zip(own, spoken)}),
            "length_error": ByClip(dict(zip(own, errors))),
        }
        words = measure_outputs(
            self.validation["metrics"],
            [info["text"] for info in infos],
            waves,
            None,
            codec.sample_rate,
            self.validation["grammar"],
            device=str(self.model.device),
            numbers=own,
        )
        return scores | words

    def _draw(
        self, folder: Path, infos: list[dict[str, Any]], spoken: list[Result], waves: list[np.ndarray], rate: int
    ) -> None:
        """Write talking faces of some clips, rendered from the first frame of each clip, if the clips exist."""
        clips = [Path(self.validation["corpus"]) / info["source"] for info in infos]
        if not clips or not all(clip.is_file() for clip in clips):
            return
        codec = load_motion(self.codecs["motion"]).to(self.model.device)
        for clip, info, result, wave in zip(clips, infos, spoken, waves):
            (frame,) = next(read_square(clip, find_square(clip, 1), 1))
            face = identity_to_tensor(frame, codec.size)
            if result.motion is not None and len(result.motion):
                pictures = codec.decode(self.stats.restore(result.motion), codec.identity(face))
                write_video(folder / f"{info['key']}.mp4", to_bytes(pictures), FPS, wave, rate)

    def adapted(self) -> nn.Module:
        """Return backbone, patch encoders and heads."""
        return self.model

    def release_info(self) -> ReleaseInfo:
        extra = {
            "motion": {"mean": self.stats.mean.tolist(), "std": self.stats.std.tolist()},
            "codecs": {stream: str(path) for stream, path in self.codecs.items() if path},
            "digests": self.digests,
            "sampling": asdict(self.sampling),
        }
        if self.words.language:
            extra["text"] = {"kind": "phonemes", "language": self.words.language}
        return self.release_of(
            "model",
            title="Talker-T2AV",
            about="Text, a voice and a face to speech and a talking face.",
            usage="from talker_t2av.pipeline import TalkerPipeline\n\n"
            'talk = TalkerPipeline.from_pretrained("FOLDER").t2av("hello", "voice.wav", "face.mp4")',
            extra=extra,
        )

    def release_files(self, folder: Path) -> None:
        """Write the tokenizer's files."""
        self.words.save(folder)
