"""Small stand-ins of released files: official names, formats and keys, made-up values."""

import json
import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from omegaconf import OmegaConf
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from hicodit.conditions.arcface import ArcFace
from lia_x import LiaX, LiaXConfig
from rvq_codec import RVQCodec, RVQCodecConfig
from talker_t2av.model import TalkerConfig, TalkerT2AV
from talker_t2av.speaker.encoder import LARGE, WavLMEncoder
from talker_t2av.upstream import LM_HEAD
from tests.reference import released_names
from whisperx_vae import WhisperXVAE, WhisperXVAEConfig

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<SPEECH_FRAME>", "<MOTION_FRAME>")
WHISPER_SPECIALS = ("endoftext", "startoftranscript", "en", "de", "translate", "transcribe", "startoflm")
WHISPER_SPECIALS += ("startofprev", "nospeech", "notimestamps")
TEMPLATE = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{%- if m.role == 'assistant' %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{{ m.content + '<|im_end|>\\n' }}{%- endfor %}"
)
LLM = {
    "vocab_size": 261, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 32, "intermediate_size": 96, "max_position_embeddings": 40960,
}  # fmt: skip
SIZES = {
    "speech_dim": 32, "motion_dim": 40, "encoder_layers": 1, "encoder_heads": 2, "head_layers": 1, "head_heads": 2,
    "max_positions": 64,
}  # fmt: skip
WAVLM = LARGE | {
    "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "num_buckets": 16,
}  # fmt: skip


def official(name: str, seed: int = 0) -> dict[str, Tensor]:
    """A state with the keys and shapes of a list in tests/golden, and values of about the size of initial weights."""
    g = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in json.loads((GOLDEN / f"{name}.keys.json").read_text()).items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(0)
        elif key.endswith(".kernel"):  # the low-pass filter of StyleGAN's networks
            taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
            state[key] = torch.outer(taps, taps) * (1 if key.startswith("enc.") else 4)
        elif len(shape) < 2:
            state[key] = torch.zeros(shape) if "bias" in key or "mean" in key else torch.ones(shape)
        else:
            state[key] = torch.randn(shape, generator=g) / max(1, math.prod(shape[1:])) ** 0.5
    return state


def talker(folder: Path) -> None:
    torch.manual_seed(0)
    state = TalkerT2AV(TalkerConfig(LLM, **SIZES)).state_dict()
    state = {key: value.clone() for key, value in state.items() if key != LM_HEAD}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"architectures": ["TalkerT2AV"], "model_type": "talker"}))
    qwen_tokenizer(folder)


def qwen_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE without merges in the files that Qwen's tokenizers come in."""
    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIALS[0], eos_token=SPECIALS[2],
        additional_special_tokens=[SPECIALS[1], *SPECIALS[3:]], chat_template=TEMPLATE,
    )  # fmt: skip
    fast.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def qwen(folder: Path) -> None:
    """A Qwen3 language model in the Hugging Face format, from which Talker-T2AV starts, with its tokenizer."""
    torch.manual_seed(1)
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = transformers.Qwen3Config(**LLM, rope_parameters=rope, tie_word_embeddings=True)
    model = transformers.Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    qwen_tokenizer(folder)


def speech_only(folder: Path) -> None:
    """The speech-only predecessor of Talker-T2AV, whose one head is called motion_cfm."""
    folder.mkdir()
    torch.manual_seed(2)
    state = TalkerT2AV(TalkerConfig(LLM, **SIZES)).state_dict()
    names = {"speech_cfm.": "motion_cfm.", "speech_patch_encoder.": "patch_encoder."}
    absent = ("motion_", "projector_motion.", LM_HEAD)
    own = {key: value for key, value in state.items() if not key.startswith(absent)}
    for ours, theirs in names.items():
        own = {key.replace(ours, theirs): value for key, value in own.items()}
    save_file({key: value.clone() for key, value in own.items()}, folder / "model.safetensors")


def whisperx_vae(file: Path) -> None:
    torch.manual_seed(0)
    sizes = {"encoder_width": 2, "hidden": 64, "decoder_width": 16, "mel_bands": 20, "whisper_heads": 1}
    model = WhisperXVAE(WhisperXVAEConfig(**sizes, latent_dim=32, whisper_context=50, whisper_layers=1))
    state = released_names.whisperx_vae(model.state_dict())
    state["semantic_model.decoder.token_embedding.weight"] = torch.zeros(4, 2)
    state["discriminator.convs.0.weight"] = torch.zeros(3)
    settings = OmegaConf.create({"cfg": {"dataset": {"sr": 24_000}}})
    more = {"epoch": 0, "global_step": 480_000, "pytorch-lightning_version": "2.1.0", "optimizer_states": [{}]}
    torch.save({"state_dict": state, "hyper_parameters": settings, **more}, file)


def lia_x(file: Path) -> None:
    torch.manual_seed(0)
    codec = LiaX(LiaXConfig(style_dim=40, scale=1, size=32, width=4, max_width=8, depth=1))
    taps = torch.outer(*2 * [torch.tensor([1.0, 3.0, 3.0, 1.0])]) / 64
    kernels = {"enc.enc_2r.block2.0.conv2.0.kernel": taps, "dec.rgb2.up.kernel": 4 * taps}
    torch.save(released_names.lia_x_state(codec) | kernels, file)


def wavlm(file: Path) -> None:
    torch.manual_seed(0)
    encoder = WavLMEncoder(transformers.WavLMConfig(**WAVLM), channels=8, pooled=8, bottleneck=8, embedding=256)
    state = released_names.speaker_encoder(encoder.state_dict())
    torch.save({"model": state | {"loss_calculator.projection.weight": torch.zeros(3)}}, file)


def avhubert(file: Path) -> None:
    state = official("conditions/avhubert_small")
    heads = 4
    modalities = ["audio", "video"]
    model = {"encoder_attention_heads": heads, "layer_norm_first": True, "modalities": modalities}
    content = {"args": None, "cfg": {"model": Namespace(**model), "task": None}, "model": state, "extra_state": {}}
    torch.save(content | {"criterion": None, "optimizer_history": [], "last_optimizer_state": None}, file)


def arcface(file: Path) -> None:
    torch.manual_seed(0)
    torch.save(ArcFace((1, 1, 1, 1)).state_dict(), file)


def poster(file: Path) -> None:
    """Always of the official shapes, as the network has no others."""
    state = {f"module.{key}": value for key, value in official("conditions/poster_v2_7").items()}
    torch.save({"epoch": 1, "state_dict": state, "best_acc": Namespace(val=67.5), "recorder": Namespace(total=1)}, file)


def maskgct(folder: Path, config: RVQCodecConfig | None = None) -> RVQCodec:
    """Write both files of a codec, by default of one with the hop and levels of the released one; return it."""
    torch.manual_seed(0)
    sizes = {"encoder_width": 4, "latent_channels": 16, "codebook_size": 16, "codebook_dim": 4, "vocos_dim": 16}
    codec = RVQCodec(config or RVQCodecConfig(**sizes, vocos_intermediate=32, vocos_layers=1))
    state = {key: value.contiguous() for key, value in codec.state_dict().items()}
    encoder = {key.removeprefix("encoder."): v for key, v in state.items() if key.startswith("encoder.")}
    decoder = {key: v for key, v in state.items() if key.startswith("quantizer.")}
    decoder |= {"model." + key.removeprefix("decoder."): v for key, v in state.items() if key.startswith("decoder.")}
    decoder["model.head.istft.window"] = torch.hann_window(1920)
    save_file(encoder, folder / "model.safetensors")
    save_file(decoder, folder / "model_1.safetensors")
    return codec


def whisper(folder: Path, letter: str = "") -> None:
    """A Whisper as the hub has them, with every size cut down; it hears English or German, and one letter if given."""
    names = [f"<|{name}|>" for name in WHISPER_SPECIALS] + [f"<|{i * 0.02:.2f}|>" for i in range(1501)]
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = transformers.WhisperTokenizer(vocab=letters, merges=[])
    words.add_special_tokens({"additional_special_tokens": names})
    ids = {name: words.convert_tokens_to_ids(f"<|{name}|>") for name in WHISPER_SPECIALS}
    end = ids["endoftext"]
    start = ids["startoftranscript"]
    tokens = {"eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": start}
    sizes = {"d_model": 16, "num_mel_bins": 80, "vocab_size": len(words)}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 64}
    more = {"suppress_tokens": None, "begin_suppress_tokens": None, "bos_token_id": end}
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes, **tokens, **more))
    if letter:  # its decoder's last state is that letter's own embedding
        norm = model.model.decoder.layer_norm
        table = model.model.decoder.embed_tokens.weight
        norm.weight.data.zero_()
        norm.bias.data.copy_(100 * table.data[words.convert_tokens_to_ids(letter)])
    model.generation_config = transformers.GenerationConfig(
        **tokens,
        max_length=12,
        is_multilingual=True,
        lang_to_id={"<|en|>": ids["en"], "<|de|>": ids["de"]},
        task_to_id={"transcribe": ids["transcribe"], "translate": ids["translate"]},
        no_timestamps_token_id=ids["notimestamps"],
        prev_sot_token_id=ids["startofprev"],
    )
    model.save_pretrained(folder)
    transformers.WhisperProcessor(transformers.WhisperFeatureExtractor(feature_size=80), words).save_pretrained(folder)


# Folders end in /, and are made before their files are written.
DOWNLOADED: dict[str, Callable[[Path], object]] = {
    "talker-t2av/": talker,
    "whisperx-vae/model.ckpt": whisperx_vae,
    "lia-x.pt": lia_x,
    "wavlm_large_finetune.pth": wavlm,
    "large_vox_iter5.pt": avhubert,
    "arcface_r100.pth": arcface,
    "affectnet-7-model_best.pth": poster,
    "acoustic_codec/": maskgct,
}


def download(folder: Path, *names: str) -> None:
    """Write what these names of `DOWNLOADED` stand for."""
    for name in names:
        path = folder / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        DOWNLOADED[name](path)


def write(work: Path) -> None:
    """Write the folders DOWNLOADED, QWEN, TTS and whisper, and links that the documentation's names stand for."""
    download(work / "DOWNLOADED", *DOWNLOADED)
    whisper(work / "whisper", "a")
    qwen(work / "QWEN")
    speech_only(work / "TTS")
    (work / "runs").mkdir()
    for name, run in (("NAME", "hicodit_synthetic"), ("A", "hicodit_synthetic"), ("B", "talker_synthetic")):
        (work / "runs" / name).symlink_to(run)
    for name in ("TUNED", "BEFORE"):
        (work / name).symlink_to("assets/rvq_speech")
