"""Fetch the released checkpoints that this project can load.

    python scripts/download_checkpoints.py talker_t2av|hicodit|metrics|all --to DIR [--list]

Files that are there and good are left alone; a stopped download goes on where it was; what arrives is verified before
it is put in its place. Nothing is asked: by downloading you accept the licence that is printed for each file.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from engine.download import DamagedError, HubFile, NoNetworkError, RemoteFile, check, fetch
from engine.errors import UserError, run_cli


@dataclass(frozen=True)
class Checkpoint:
    """What belongs together: what it is, its licence, who published it, its files."""

    what: str
    licence: str
    origin: str
    files: tuple[RemoteFile, ...]


TALKER = "HKUSTAudio/Talker-T2AV"
MASKGCT = ("amphion/MaskGCT", "46a1964a69da35562b1f0daf5f737bcca65aa8f5")

# Sizes, digests and revisions are given only where a public record states them.
CATALOGUE: dict[str, tuple[Checkpoint, ...]] = {
    "talker_t2av": (
        Checkpoint(
            "Talker-T2AV: backbone, patch encoders, diffusion heads, tokenizer",
            "Apache-2.0",
            f"https://huggingface.co/{TALKER}",
            tuple(
                RemoteFile(f"talker-t2av/{name}", HubFile(TALKER, f"talker-t2av/{name}"))
                for name in (
                    "config.json",
                    "tokenizer.json",
                    "tokenizer_config.json",
                    "chat_template.jinja",
                    "model.safetensors",
                )
            ),
        ),
        Checkpoint(
            "WhisperX-VAE: speech codec",
            "Apache-2.0",
            f"https://huggingface.co/{TALKER}",
            (RemoteFile("whisperx-vae/model.ckpt", HubFile(TALKER, "whisperx-vae/model.ckpt")),),
        ),
        Checkpoint(
            "LIA-X: portrait codec",
            "CC BY-NC 4.0: non-commercial use only",
            "https://github.com/wyhsirius/LIA-X",
            (RemoteFile("lia-x.pt", HubFile("YaohuiW/LIA-X", "lia-x.pt")),),
        ),
        Checkpoint(
            "WavLM-Large and ECAPA-TDNN: speaker encoder (an unmodified copy; the original is behind Google Drive)",
            "CC BY-SA 3.0, that of the UniSpeech repository",
            "https://github.com/microsoft/UniSpeech/tree/main/downstreams/speaker_verification",
            (
                RemoteFile(
                    "wavlm_large_finetune.pth",
                    HubFile("bezzam/wavlm_large_finetune_seed_tts_eval", "wavlm_large_finetune.pth"),
                    1_301_926_579,
                    "51f07e3b94d9e0262a6a675ef5a087be3dd09e8c62e9d886827f44f82fe7f94b",
                ),
            ),
        ),
    ),
    "hicodit": (
        Checkpoint(
            "AV-HuBERT Large: lip features",
            "Meta's AV-HuBERT licence: non-commercial research only",
            "https://github.com/facebookresearch/av_hubert",
            (
                RemoteFile(
                    "large_vox_iter5.pt",
                    "https://dl.fbaipublicfiles.com/avhubert/model/lrs3_vox/clean-pretrain/large_vox_iter5.pt",
                ),
            ),
        ),
        Checkpoint(
            "ArcFace iresnet100, Glint360K: identity (an unmodified copy; the original is behind OneDrive)",
            "InsightFace's models: non-commercial research only",
            "https://github.com/deepinsight/insightface/tree/master/recognition/arcface_torch",
            (
                RemoteFile(
                    "arcface_r100.pth",
                    HubFile(
                        "ygtxr1997/CelebBasis",
                        "glint360k_cosface_r100_fp16_0.1/backbone.pth",
                        "9614082e6a1359107dcc38bab6db975ca0900ee2",
                        "dataset",
                    ),
                    261_223_796,
                    "5f631718e783448b41631e15073bdc622eaeef56509bbad4e5085f23bd32db83",
                ),
            ),
        ),
        Checkpoint(
            "POSTER V2, AffectNet-7: expression",
            "code MIT; trained on AffectNet, which is for research only",
            "https://github.com/Talented-Q/POSTER_V2",
            (
                RemoteFile(
                    "affectnet-7-model_best.pth",
                    "https://drive.usercontent.google.com/download?id=1c_gp5UdlcMjIB2dZtdhXFfHOQg1OqU-D"
                    "&export=download&confirm=t",
                ),
            ),
        ),
        Checkpoint(
            "YuNet: face detector",
            "MIT",
            "https://github.com/opencv/opencv_zoo/tree/main/models/face_detection_yunet",
            (
                RemoteFile(
                    "face_detection_yunet_2023mar.onnx",
                    "https://github.com/opencv/opencv_zoo/raw/47534e27c9851bb1128ccc0102f1145e27f23f98/models/"
                    "face_detection_yunet/face_detection_yunet_2023mar.onnx",
                    232_589,
                    "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4",
                ),
            ),
        ),
        Checkpoint(
            "MaskGCT's acoustic codec: speech tokens",
            "CC BY-NC 4.0: non-commercial use only",
            f"https://huggingface.co/{MASKGCT[0]}",
            (
                RemoteFile(
                    "acoustic_codec/model.safetensors",
                    HubFile(MASKGCT[0], "acoustic_codec/model.safetensors", MASKGCT[1]),
                ),
                RemoteFile(
                    "acoustic_codec/model_1.safetensors",
                    HubFile(MASKGCT[0], "acoustic_codec/model_1.safetensors", MASKGCT[1]),
                    sha256="9dbacf8050a4b0d7948eb4224fdc7c61dfe9cb7876d8f32560b93727358256a5",
                ),
            ),
        ),
    ),
    "metrics": (
        Checkpoint(
            "SyncNet: lip synchrony, LSE-C and LSE-D",
            "code MIT; none is stated for the weights",
            "https://github.com/joonson/syncnet_python",
            (
                RemoteFile(
                    "syncnet_v2.model",
                    "https://www.robots.ox.ac.uk/~vgg/software/lipsync/data/syncnet_v2.model",
                    54_573_114,
                    "961e8696f888fce4f3f3a6c3d5b3267cf5b343100b238e79b2659bff2c605442",
                ),
            ),
        ),
    ),
}


def chosen(group: str) -> tuple[Checkpoint, ...]:
    """The checkpoints of a group of `CATALOGUE`, or of all of them."""
    return sum(CATALOGUE.values(), ()) if group == "all" else CATALOGUE[group]


def presence(file: RemoteFile, folder: Path) -> str:
    """`missing`, `present` or `damaged`; a file of known digest is read whole."""
    path = folder / file.path
    if not path.is_file():
        return "missing"
    try:
        check(path, file)
    except DamagedError:
        return "damaged"
    return "present"


def listing(group: str, folder: Path) -> list[str]:
    """What there is, how big, whether it is there, from where and under which licence, one line a fact."""
    lines = []
    for checkpoint in chosen(group):
        lines += [checkpoint.what, f"    licence: {checkpoint.licence}", f"    published at {checkpoint.origin}"]
        for file in checkpoint.files:
            size = f"{file.size / 1e6:,.1f} MB" if file.size else "size unknown"
            verified = "SHA-256 known" if file.sha256 else "no SHA-256 known"
            lines += [f"    {presence(file, folder):8} {file.path} ({size}, {verified})", f"        from {file.source}"]
    return lines


def download(group: str, folder: Path, endpoint: str | None = None, pause: float = 1.0) -> None:
    """Fetch all files of a group; one that cannot be had does not keep the others from coming.

    Raises:
        NoNetworkError: nothing can be reached.
        UserError: some files could not be had; each was named on standard error.
    """
    failed, total = [], 0
    for checkpoint in chosen(group):
        print(f"{checkpoint.what}\n    licence: {checkpoint.licence} ({checkpoint.origin})", flush=True)
        for file in checkpoint.files:
            total += 1
            try:
                fetched = fetch(file, folder, endpoint, pause)
                print(f"    {'fetched' if fetched else 'there already'}: {folder / file.path}", flush=True)
            except NoNetworkError:
                raise
            except UserError as error:
                failed.append(file.path)
                print(
                    f"    failed: {file.path}: {error} (published at {checkpoint.origin})", file=sys.stderr, flush=True
                )
    if failed:
        raise UserError(f"{len(failed)} of {total} files could not be fetched: {', '.join(failed)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", nargs="?", choices=[*CATALOGUE, "all"], help="which files; --list: all if not given")
    parser.add_argument("--to", type=Path, default=Path("checkpoints"), help="folder (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="only say what there is and whether it is here")
    args = parser.parse_args()
    if args.list:
        print("\n".join(listing(args.group or "all", args.to)))
    elif args.group is None:
        parser.error(f"say which files: {', '.join([*CATALOGUE, 'all'])}")
    else:
        download(args.group, args.to)


if __name__ == "__main__":
    run_cli(main)
