"""Release folders on the Hugging Face hub."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from huggingface_hub import constants, errors, snapshot_download

from engine.errors import UserError
from engine.files import CHECKOUT

NAME = re.compile(r"([\w-][\w.-]*)/([\w-][\w.-]*)(?:@([\w./-]+))?")  # OWNER/NAME, OWNER/NAME@REVISION
LIBRARY = "speaking-faces"
TASKS = {  # pipeline tag and further tags on the hub, by kind of release
    "hicodit": ("video-to-video", ("lip-to-speech", "video-to-speech", "arxiv:2604.15923")),
    "talker_t2av": ("text-to-video", ("talking-head", "text-to-speech", "audio-driven", "arxiv:2604.23586")),
    "rvq_codec": ("audio-to-audio", ("speech-codec",)),
    "whisperx_vae": ("audio-to-audio", ("speech-codec",)),
    "lia_x": ("image-to-video", ("portrait-animation",)),
    "voice_encoder": ("feature-extraction", ("speaker-embedding",)),
}


def release_folder(source: str | Path, key: str = "") -> Path:
    """Return the folder `source`, or the local copy of the hub repository of that name.

    OWNER/NAME is looked up on the hub only if neither this folder nor a folder OWNER exists, so that mistyped paths are
    not downloaded. Without a network, a cached copy is used. OWNER/NAME@REVISION selects a branch, tag or commit. A
    bundled release assets/NAME is found from any working directory.

    Args:
        key: name of the setting with this value, for error messages.

    Raises:
        UserError: If the folder is a training run, or the repository cannot be downloaded.
    """
    _refuse_run(source, key)
    if (folder := _local_folder(source)) is not None:
        return folder
    name = NAME.fullmatch(str(source))
    if name is None or Path(name[1]).exists():
        return Path(source)
    return _snapshot(f"{name[1]}/{name[2]}", name[3])


def _local_folder(source: str | Path) -> Path | None:
    """Return the path `source`, or that of the bundled release assets/NAME; None if neither exists."""
    if Path(source).exists():
        return Path(source)
    name = NAME.fullmatch(str(source))
    is_bundled = name is not None and name[1] == "assets" and (CHECKOUT / source).is_dir()
    return CHECKOUT / source if is_bundled else None


@lru_cache
def _snapshot(repository: str, revision: str | None) -> Path:
    from engine.download import NoNetworkError, check_reachable

    offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    endpoint = constants.ENDPOINT
    try:
        if not offline:
            check_reachable(endpoint)
    except NoNetworkError as error:
        offline = str(error)
    try:
        return Path(snapshot_download(repository, revision=revision, endpoint=endpoint, local_files_only=bool(offline)))
    except (errors.HTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        why = f"there is no cached copy from the hub ({offline})"
        if not offline:
            why = f"it could not be downloaded from the hub: {' '.join(str(error.__cause__ or error).split())[:200]}"
        raise UserError(f"{repository} is not a local folder, and {why}") from error


def _refuse_run(source: str | Path, key: str = "") -> None:
    """Raise UserError if a folder is that of a training run, whose release is a subfolder.

    Args:
        key: name of the setting, for the error message.
    """
    release = Path(source) / "release"
    is_run = (release / "model.safetensors").is_file() and not (Path(source) / "model.safetensors").exists()
    if is_run:
        setting = f"{key}=" if key else ""
        raise UserError(f"{setting}{source} is the folder of a training run: use its release, {setting}{release}")


def check_release(key: str, source: str | None) -> None:
    """Check that the release of the setting `key` exists. A name on the hub is accepted."""
    if source is None:
        return
    _refuse_run(source, key)
    if _local_folder(source) is None:
        name = NAME.fullmatch(source)
        if name is None or Path(name[1]).exists():
            raise UserError(f"{key}={source}: not found; expected a folder, or OWNER/NAME on the hub")
