"""HiCoDiT's training task: losses, validation with a recogniser, and release.

Axes: B batch, T video frames, L = 2 T token frames, K token levels, J expression windows, M masked positions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.codec import load_codec
from engine.device import to_device
from engine.errors import UserError, package_folder
from engine.evaluation.validation import ByClip, Share
from engine.faces.source import CASCADE
from engine.metrics.registry import metrics_of
from engine.release import load_strict
from engine.settings import require_choice
from engine.shards.recordings import spread
from engine.shards.source import join, read_index, read_json
from engine.training.task import ReleaseInfo, Task
from hicodit.conditions import encoder_config
from hicodit.conditions.types import Conditions
from hicodit.data import FACE_DETECTOR, FEATURE_TENSORS, HiCoDiTDataset
from hicodit.diffusion import LogLinearNoise, masked_at, stratified_times, weighted_score_entropy
from hicodit.layers import AdaLNBlock
from hicodit.model import CONDITIONS, TOKENS_PER_FRAME, ModelConfig, positions_of, rows_of
from hicodit.pipeline import HiCoDiTPipeline
from hicodit.settings import GuidanceScales, SamplerConfig
from hicodit.system import CODECS, HiCoDiTSystem
from hicodit.validation import Recordings, evaluate_clips

MIN_TIME = 1e-3  # minimum time in training; independent of the schedule's eps and the sampler's end
# Tensors that `init` may not contain: of auxiliary losses, other lip front ends, and zero-initialised inputs.
NEW = re.compile(r"\.phoneme_head\.|\.lip\.(frame|project)\.|\.fuse_expression\.")
TABLES = re.compile(r"\.embeddings\.|\.heads\.")  # tensors that depend on the tokenizer
VALIDATION_STEPS = 16  # sufficient to compare runs, at a quarter of the cost


class HiCoDiTTask(Task):
    """Trains HiCoDiT with multi-level denoising score entropy, identity alignment, and auxiliary losses of the tiny
    encoders.

    Args:
        model, encoders: configs of the score network and the condition encoders.
        codec: release folder of the tokenizer.
        shards: folder or URL of the prepared splits; validation uses `validate_splits`.
        grammar: recogniser for WER in validation: a JSGF grammar or a folder with Whisper. None: Whisper medium, if
            downloaded.
        identity_weight: weight of the L1 loss (a mean over 256 values) between the GE2E embeddings of face and voice;
            100 in the paper. It only trains the identity adapter and the face encoder.
        identity_input: identity condition in training: "voice", the GE2E embedding (as in the paper), or "face", the
            output of the adapter. Without the identity loss (weight 0), these are the two interpretations of that
            ablation: the adapter is untrained, or trained by the score loss.
        phoneme_weight, expression_weight: weights of the auxiliary losses of the tiny encoders; not in the paper, whose
            encoders are pre-trained (encoders.kind "upstream").
        sampler, guidance: defaults that are stored in the release.
        validate_clips: number of clips per held-out split to synthesise.
        validate_splits: the held-out splits. An empty list disables validation.
        validate_metrics: figures of `engine.metrics.registry`. Those whose package or network is missing are skipped.
        validate_corpus: folder of the original recordings. Speech is then generated from their video files, as in
            inference, including face detection. None: from the crops or features in the shards.
        init: initial release with the same sizes and tokens.
        index: path or URL of the training shards' index.json. Its digests of features, which inference and fine-tuning
            verify, and its face detector are stored in the release. None: not recorded.
        new_tokens: reinitialise token embeddings and heads, so that `init` may use another tokenizer.
        frozen: parts to freeze, among model (the score network), lip, identity and expression. If only the lip encoder
            remains, just its auxiliary phoneme loss is computed, at a third of the time per step.
    """

    def __init__(
        self,
        model: dict[str, Any],
        encoders: dict[str, Any],
        codec: str,
        shards: str,
        grammar: str | None,
        identity_weight: float = 100.0,
        identity_input: str = "voice",
        phoneme_weight: float = 0.2,
        expression_weight: float = 0.1,
        sampler: dict[str, Any] | None = None,
        guidance: dict[str, Any] | None = None,
        validate_clips: int = 24,
        validate_splits: Sequence[str] = ("seen", "unseen"),
        validate_metrics: Sequence[str] = ("wer", "wer_free"),
        validate_corpus: str | None = None,
        recipe: str = "",
        init: str | None = None,
        new_tokens: bool = False,
        frozen: Sequence[str] = (),
        index: str | None = None,
    ) -> None:
        super().__init__()
        self.system = HiCoDiTSystem(ModelConfig(**model), encoder_config(encoders))
        if self.system.model.config.attention == "flash":
            package_folder("flash_attn", "flash-attn, for task.model.attention=flash", "flash")
        self.codec = Path(codec)
        self.shards = shards
        self.recipe = recipe
        self.grammar = Path(grammar) if grammar else None
        if identity_input not in ("voice", "face"):
            raise UserError(f"task.identity_input={identity_input!r} must be voice or face")
        self.identity_weight = identity_weight
        self.identity_input = identity_input
        self.phoneme_weight = phoneme_weight
        self.expression_weight = expression_weight
        self.validate_clips = validate_clips
        self.validate_splits = validate_splits
        self.validate_metrics = validate_metrics
        metrics_of(validate_metrics)  # fail early if a metric does not exist
        self.sampler = SamplerConfig(**(sampler or {}))
        self.guidance = GuidanceScales(**(guidance or {}))
        self.noise = LogLinearNoise()
        tokenizer = load_codec(codec, CODECS)
        self.token_digest = tokenizer.digest()
        c = self.system.model.config
        if (c.levels, c.codes) != (tokenizer.levels, tokenizer.codes):
            raise UserError(
                f"task.model has {c.levels} levels of {c.codes} codes, tokenizer {codec} has {tokenizer.levels} of "
                f"{tokenizer.codes}: set task.model.levels and task.model.codes accordingly"
            )
        made = (read_json(index).get("digests") or {}) if index else {}
        self.features = {name: made[name] for name in (*FEATURE_TENSORS, FACE_DETECTOR) if name in made}
        if init:
            self._start_from(init, new_tokens)
        self._freeze(frozen)
        self.recordings = None
        if validate_corpus and not self.trains_lips_only:
            self.recordings = Recordings(Path(validate_corpus), self.features.get(FACE_DETECTOR, CASCADE), shards)

    def _freeze(self, frozen: Sequence[str]) -> None:
        """Freeze parts of the system, and find out whether the lip encoder alone remains."""
        encoders = self.system.encoders
        parts = {"model": self.system.model}
        if encoders.learns:
            parts |= {name: getattr(encoders, name) for name in CONDITIONS}
        for name in frozen:
            require_choice("task.frozen", name, ("model", *CONDITIONS))
            if name in parts:
                parts.pop(name).requires_grad_(False)
        if not parts:
            raise UserError(f"task.frozen={list(frozen)} leaves nothing to train: freeze fewer parts")
        self.trains_lips_only = list(parts) == ["lip"]
        if self.trains_lips_only and encoders.lip.phoneme_head is None:
            raise UserError(
                f"task.frozen={list(frozen)} leaves the lip encoder, whose loss needs task.encoders.phonemes > 0"
            )

    def _start_from(self, init: str, new_tokens: bool) -> None:
        """Load the weights of a release."""
        start = HiCoDiTSystem.from_pretrained(init)
        state = start.state_dict()
        before = start.release.get("features") or {}
        for name, made in self.features.items():
            if name != FACE_DETECTOR and before.get(name, made) != made:
                raise UserError(
                    f"init={init} was trained on {name} features {before[name]}, the shards contain {made}: "
                    "prepare them with the encoders of that release"
                )
        renewed = start.release.get("token_digest") not in (None, self.token_digest)
        if renewed and not new_tokens:
            raise UserError(
                f"init={init} was trained with another tokenizer than task.codec={self.codec}: use that tokenizer, "
                "or set task.new_tokens=true to reinitialise token embeddings and heads"
            )
        ours = self.system.state_dict()
        state = {key: value for key, value in state.items() if key in ours or not NEW.search(key)}
        for key, value in ours.items():
            missing = key not in state or state[key].shape != value.shape
            if (missing and NEW.search(key)) or (renewed and TABLES.search(key)):
                state[key] = value
        load_strict(self.system, state, f"init={init}")

    on_host = ("frames",)

    def parts(self) -> dict[str, nn.Module]:
        return {"model": self.system}

    def blocks(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, AdaLNBlock)]

    def separate_clip_groups(self) -> list[nn.Module]:
        """Return the modules trained by the identity loss: with its weight of 100, it would dominate a common gradient
        norm.
        """
        encoders = self.system.encoders
        return [self.system.model.identity_adapter, *([encoders.identity] if encoders.learns else [])]

    def loss_counts(self, batch: dict[str, Tensor]) -> dict[str, int]:
        frames = int(batch["frames"].sum())
        if self.trains_lips_only:
            return {"phoneme": frames}
        clips = len(batch["frames"])
        tokens = TOKENS_PER_FRAME * frames * self.system.model.config.levels
        return {"dse_low": tokens, "dse_high": tokens, "phoneme": frames, "identity": clips, "expression": clips}

    def tokens(self, batch: dict[str, Tensor]) -> int:
        return TOKENS_PER_FRAME * int(batch["frames"].sum()) * self.system.model.config.levels

    def forward(self, batch: dict[str, Tensor], part: str) -> dict[str, Tensor]:
        """Compute the losses of a batch of `hicodit.data.HiCoDiTDataset.collate`.

        The losses are the score entropy by group of levels, with one t per clip and independent masks per level and
        frame, the distance between predicted and actual voice embedding, and the losses of the tiny encoders.

        Identity and expression are derived from the audio, as in the paper. Frozen encoders are not run, as their
        features are stored.
        """
        if self.trains_lips_only:
            loss = self.phoneme_loss(self.system.encoders.lip(batch["mouth"], batch["frames"]), batch)
            return {"phoneme": loss, "loss": loss}
        conditions, voice = self.conditions(batch)
        encoders = self.system.encoders
        model = self.system.model
        tokens = batch["tokens"]
        t, noisy, where = self.mask(tokens, conditions.frames)
        conditioning = model.prepare(conditions, keep=model.draw_keep(len(tokens), tokens.device))
        log_q = model(noisy, self.noise.sigma(t), conditioning, where)[0]
        clip, level, frame = rows_of(where)
        entropy = weighted_score_entropy(log_q, tokens[clip, level, frame], t[clip], self.noise)
        losses = self.by_stage(entropy, where, conditions.frames)
        losses["identity"] = self.identity_weight * F.l1_loss(voice, batch["ge2e"])
        if encoders.learns:
            shown = encoders.expression(batch["face"]).float()
            losses["expression"] = self.expression_weight * F.cross_entropy(shown, batch["face_expression"])
        if encoders.learns and encoders.lip.phoneme_head is not None:
            losses["phoneme"] = self.phoneme_loss(conditions.lip, batch)
        losses["loss"] = sum(losses.values())
        return losses

    def phoneme_loss(self, lip: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Return the weighted cross-entropy of the phonemes of valid frames, predicted from lip features (B, T, E)."""
        valid = torch.arange(lip.shape[1], device=batch["frames"].device) < batch["frames"][:, None]
        real = to_device(valid.flatten().nonzero()[:, 0], lip.device)
        logits = self.system.encoders.lip.phoneme_head(lip).flatten(0, 1)[real].float()
        return self.phoneme_weight * F.cross_entropy(logits, batch["phoneme"].flatten()[real])

    def conditions(self, batch: dict[str, Tensor]) -> tuple[Conditions, Tensor]:
        """Return the training conditions, and the voice embedding (B, 256) predicted from the face."""
        frames = batch["frames"]
        encoders = self.system.encoders
        if "lip" in batch:
            lip = batch["lip"].float()
            face = batch["face_identity"].float()
        else:
            lip = encoders.lip(batch["mouth"], frames)
            face = encoders.identity(batch["face"][:, None])
        voice = self.system.model.adapt_identity(face).float()
        identity = batch["ge2e"] if self.identity_input == "voice" else voice
        return Conditions(lip, identity, batch["expression"], frames), voice

    def mask(self, tokens: Tensor, frames: Tensor) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Draw a time (B,) for each clip of tokens (B, K, L) and mask a part of its tokens.

        Masks are drawn on the host, as shapes depend on the number of masked tokens.

        Returns:
            Times, tokens, and the masked positions of each level (see `hicodit.model.positions_of`).
        """
        t = stratified_times(len(tokens), MIN_TIME)
        masked = masked_at(self.noise.sigma(t), torch.rand(tokens.shape))
        valid = torch.arange(tokens.shape[2]) < TOKENS_PER_FRAME * frames.cpu()[:, None]
        noisy = torch.where(to_device(masked, tokens.device), self.system.model.mask_id, tokens)
        return to_device(t, tokens.device), noisy, positions_of(masked & valid[:, None], tokens.device)

    def by_stage(self, values: Tensor, where: Sequence[tuple[Tensor, Tensor]], frames: Tensor) -> dict[str, Tensor]:
        """Sum the score entropies (M,) of the masked tokens over each group of levels, normalised per token.

        The paper's sum is divided by the number of tokens, so that batch size and clip length do not change the scale
        that gradient clipping sees.
        """
        c = self.system.model.config
        low = sum(len(clip) for clip, _ in where[: c.low_levels])
        count = TOKENS_PER_FRAME * frames.sum() * c.levels
        return {"dse_low": values[:low].sum() / count, "dse_high": values[low:].sum() / count}

    def measure(self, folder: Path, share: Share) -> dict[str, float | ByClip]:
        """Measure losses of held-out clips, and `validate_metrics` of speech generated only from their video.

        One process measures the losses, as their random numbers are drawn sequentially.
        """
        if self.trains_lips_only:
            return self.measure_lips() if share.first else {}
        results: dict[str, float | ByClip] = {}
        device = self.system.model.null_lip.device
        sampler = replace(self.sampler, steps=min(self.sampler.steps, VALIDATION_STEPS))
        codec = load_codec(self.codec, CODECS)
        face_source = self.recordings.face_source if self.recordings else None
        pipeline = HiCoDiTPipeline(self.system, codec, sampler, self.guidance, device, face_source)
        if not self.system.encoders.learns:  # inference verifies the digests of their weights
            self.system.encoders.expected = dict(self.features)
        for split in self.validate_splits:
            data = self.held_out_data(split)
            if share.first:
                losses = self.held_out_losses(data.load, data.collate, spread(len(data), self.validate_clips))
                results[f"loss_{split}"] = losses["loss"]
                results[f"dse_{split}"] = losses["dse_low"] + losses["dse_high"]
            scores = evaluate_clips(
                pipeline,
                data,
                self.grammar,
                self.validate_clips,
                folder / split,
                self.validate_metrics,
                share,
                self.recordings,
            )
            results |= {f"{name}_{split}": value for name, value in scores.items()}
        return results

    def held_out_data(self, split: str) -> HiCoDiTDataset:
        """Return the clips of a held-out split, with the heard expression as condition if it is known."""
        source = join(self.shards, split)
        encoders = self.system.encoders
        heard = "heard" if "heard_expression" in (read_index(source).get("digests") or ()) else "seen"
        data = HiCoDiTDataset(source, self.codec, encoders.config.kind, expression=heard, augment=False)
        data.shards.check_made_with({name: made for name, made in self.features.items() if name in FEATURE_TENSORS})
        return data

    def measure_lips(self) -> dict[str, float]:
        """Return for each held-out split the frame error rate (%) of the phonemes predicted by the lip encoder, over
        frames with speech.
        """
        lip = self.system.encoders.lip
        device = lip.phoneme_head.weight.device
        results = {}
        for split in self.validate_splits:
            data = HiCoDiTDataset(join(self.shards, split), self.codec)
            wrong = spoken = 0
            for index in spread(len(data), self.validate_clips):
                clip = data.read(index)[1]
                mouth = clip["mouth"][None].to(device)
                heads = lip.phoneme_head(lip(mouth, torch.tensor([mouth.shape[1]])))[0]
                speech = clip["phoneme"] > 0
                wrong += int((heads.argmax(-1).cpu() != clip["phoneme"])[speech].sum())
                spoken += int(speech.sum())
            results[f"phoneme_error_{split}"] = 100 * wrong / max(spoken, 1)
        return results

    def adapted(self) -> nn.Module:
        """Return the score network. The condition encoders are not adapted."""
        return self.system.model

    def release_info(self) -> ReleaseInfo:
        extra = {
            "codec": str(self.codec),
            "token_digest": self.token_digest,
            "sampler": asdict(self.sampler),
            "guidance": asdict(self.guidance),
            "features": self.features,
        }
        return self.release_of(
            "system",
            title="HiCoDiT",
            about=f"Silent video of a face to speech (arXiv 2604.15923), in tokens of `{self.codec.name}`.",
            usage="from hicodit.pipeline import HiCoDiTPipeline\n\n"
            'speech = HiCoDiTPipeline.from_pretrained("FOLDER")("clip.mp4", seed=0)',
            extra=extra,
        )
