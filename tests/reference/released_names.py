"""Our state dicts under the names of released files, to write stand-ins for those files in tests.

The product reads released names only. Here its tables are inverted over the official key lists.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from engine.official import Rules, rename
from lia_x import LiaX
from lia_x.upstream import RULES as LIA_X
from talker_t2av.speaker.encoder import RULES as SPEAKER
from whisperx_vae.upstream import RULES as WHISPERX_VAE

GOLDEN = Path(__file__).parents[1] / "golden"


def _renamed(state: dict[str, Tensor], rules: Rules, released: Iterable[str]) -> dict:
    names = {rename(key, rules): key for key in released}
    return {names[key]: value for key, value in state.items()}


def whisperx_vae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A WhisperX-VAE's state dict, of any size up to the released one, as its Lightning checkpoint names it."""
    return _renamed(
        state, WHISPERX_VAE, json.loads((GOLDEN / "codecs" / "wxvae_full_encode_in64.keys.json").read_text())
    )


def speaker_encoder(state: dict[str, Tensor], norm: str = "layer") -> dict[str, Tensor]:
    """A speaker encoder's state dict by original names, which depend on the extractor's norm and may have biases."""
    released = list(json.loads((GOLDEN / "conditions" / "wavlm_ecapa_large.keys.json").read_text()))
    released += [f"feature_extract.model.feature_extractor.conv_layers.{i}.0.bias" for i in range(7)]
    if norm == "group":  # its one norm is not wrapped between transpositions
        released = [key.replace(".2.1.", ".2.") for key in released]
    return _renamed(state, SPEAKER, released)


def lia_x_state(codec: LiaX) -> dict[str, Tensor]:
    """A LIA-X's state dict, of any size up to the released one, as `lia-x.pt` holds it except for the kernels."""
    shapes = json.loads((GOLDEN / "codecs" / "liax_full.keys.json").read_text())
    names = {rename(key, LIA_X): key for key in shapes}
    last = f"encoder.blocks.{len(codec.encoder.blocks) - 1}."
    state = {}
    for key, value in codec.state_dict().items():
        name = names[key.replace(last, "encoder.blocks.last.")]
        state[name] = value[None] if len(shapes[name]) == 5 else value
    return state
