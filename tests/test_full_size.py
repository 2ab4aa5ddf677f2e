"""Networks of the published sizes, on the meta device, and recipes with the values that papers state."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from transformers import WavLMConfig

from engine.config import compose, load, plain
from engine.metrics.lip_sync import SyncNet
from engine.official import rename_all
from engine.release import _no_larger_than, load_strict
from hicodit.conditions import avhubert, poster2
from hicodit.conditions.arcface import ArcFace
from hicodit.conditions.avhubert import AVHubert, AVHubertConfig
from hicodit.conditions.poster2 import POSTER2
from hicodit.conditions.types import EXPRESSIONS
from lia_x import LiaX, LiaXConfig
from lia_x import upstream as lia_x
from rvq_codec import RVQCodec, RVQCodecConfig
from rvq_codec import upstream as rvq
from talker_t2av.model import TalkerConfig, TalkerT2AV
from talker_t2av.speaker import encoder as speaker
from whisperx_vae import WhisperXVAE, WhisperXVAEConfig
from whisperx_vae import upstream as wxvae

GOLDEN = Path(__file__).parent / "golden"
BASE = plain(compose("train", ["experiment=talker_released"]).task.model)


# Lists of the released tensors, how they become ours, the configuration read off them and the expected one, and what
# makes the network of it.
NETWORKS = {
    "AV-HuBERT": (
        ["conditions/avhubert_large"], avhubert.our_state, avhubert.released_config, AVHubertConfig(), AVHubert,
    ),
    "ArcFace": (["conditions/arcface_iresnet100"], dict, lambda _: None, None, lambda _: ArcFace()),
    "POSTER V2": (
        ["conditions/poster_v2_7"], lambda state: rename_all(state, poster2.RULES), lambda _: None, None,
        lambda _: POSTER2(EXPRESSIONS),
    ),
    "SyncNet": (["conditions/syncnet_net"], dict, lambda _: None, None, lambda _: SyncNet()),
    "WavLM-ECAPA": (
        ["conditions/wavlm_ecapa_large"], lambda state: rename_all(state, speaker.RULES),
        lambda state: (speaker.LARGE | speaker.wavlm_sizes(state), speaker.head_sizes(state)),
        (speaker.LARGE, {"channels": 512, "pooled": 1536, "bottleneck": 128, "embedding": 256}),
        lambda sizes: speaker.WavLMEncoder(WavLMConfig(**sizes[0]), **sizes[1]),
    ),
    "MaskGCT's codec": (
        ["codecs/mgct_full_encoder", "codecs/mgct_full_decoder"], lambda state: rename_all(state, rvq.RULES),
        lambda state: RVQCodecConfig(**rvq.config_of(state)), RVQCodecConfig(), RVQCodec,
    ),
    "WhisperX-VAE": (
        ["codecs/wxvae_full_encode_in64"], lambda state: rename_all(state, wxvae.RULES),
        lambda state: WhisperXVAEConfig(**wxvae.config_of(state)), WhisperXVAEConfig(), WhisperXVAE,
    ),
    "LIA-X": (
        ["codecs/liax_full"],
        lambda state: lia_x.our_state({key: x for key, x in state.items() if not key.endswith(".kernel")}),
        lambda state: LiaXConfig(**lia_x.config_of(state)), LiaXConfig(), LiaX,
    ),
    "Talker-T2AV": (
        ["talker/talker_full"], dict, lambda _: TalkerConfig(**BASE), TalkerConfig(llm=BASE["llm"]), TalkerT2AV,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("lists", "ours", "read", "config", "network"), NETWORKS.values(), ids=NETWORKS)
def test_names_and_shapes_of_tensors_equal_the_published_checkpoint(lists, ours, read, config, network):
    shapes = {}
    for name in lists:
        shapes |= json.loads((GOLDEN / f"{name}.keys.json").read_text())
    state = ours({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    assert read(state) == config
    with torch.device("meta"):
        load_strict(network(config), state, "the list", assign=True)


@pytest.mark.parametrize(
    ("codec", "recipe"), [(RVQCodec, "rvq_paper"), (WhisperXVAE, "whisperx_vae_paper"), (LiaX, "lia_x_paper")]
)
def test_a_full_size_codec_passes_the_size_check_of_its_release(codec, recipe):
    arguments = plain(compose("train", [f"experiment={recipe}"]).task.codec)
    with torch.device("meta"):
        state = codec.from_arguments(arguments).release_state_dict()
        with _no_larger_than(state, codec.max_extra_tensors, codec.max_extra_params):
            codec.from_arguments(arguments)


TABLE = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("paper_values.yaml")))
CASES = [
    pytest.param(recipe, row, id=f"{recipe} {row['setting']}") for recipe in TABLE for row in TABLE[recipe]["values"]
]


@pytest.fixture(scope="module")
def composed():
    """Return each recipe, composed once."""
    return {recipe: load("train", [f"experiment={recipe}", *about["words"]]) for recipe, about in TABLE.items()}


@pytest.mark.parametrize(("recipe", "row"), CASES)
def test_a_recipe_has_the_value_of_its_paper(composed, recipe, row):
    value = OmegaConf.select(composed[recipe], row["setting"], throw_on_missing=True)
    value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    assert value == row["value"], f"section {row['section']}: {row['states']}"


@pytest.mark.parametrize("setting", ["delay=1", "order=av", "order=va"])
def test_ablations_of_the_talker_reach_model_and_data(setting):
    words = ["experiment=talker_paper", *TABLE["talker_paper"]["words"], f"task.model.{setting}"]
    config = load("train", words)
    model = TalkerConfig(**OmegaConf.to_container(config.task.model, resolve=True))
    assert (config.data.train.delay, config.data.train.order) == (model.delay, model.order) != (0, "add")
