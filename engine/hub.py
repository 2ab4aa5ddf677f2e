"""Release folders by their name on the Hugging Face hub."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from huggingface_hub import constants, errors, snapshot_download

from engine.download import NoNetworkError, check_reachable
from engine.errors import UserError

CHECKOUT = Path(__file__).resolve().parents[1]
NAME = re.compile(r"([\w-][\w.-]*)/([\w-][\w.-]*)(?:@([\w./-]+))?")  # OWNER/NAME, OWNER/NAME@REVISION


def release_folder(place: str | Path) -> Path:
    """Return the folder `place`, or, if there is none, the local copy of the hub's repository of that name.

    OWNER/NAME is looked for on the hub only if there is neither such a folder nor a folder OWNER here: a mistyped path
    stays a path. Without a network, an earlier copy is used. OWNER/NAME@REVISION names a branch, tag or commit. A
    bundled release, assets/NAME, is found from every folder.

    Raises:
        UserError: the hub has no such repository or refuses it, or cannot be reached and there is no copy.
    """
    name = NAME.fullmatch(str(place))
    if name is None or Path(place).exists() or Path(name[1]).exists():
        return Path(place)
    if name[1] == "assets" and (CHECKOUT / place).is_dir():
        return CHECKOUT / place
    return _snapshot(f"{name[1]}/{name[2]}", name[3])


@lru_cache
def _snapshot(repository: str, revision: str | None) -> Path:
    offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    try:
        if not offline:
            check_reachable(constants.ENDPOINT)
    except NoNetworkError as error:
        offline = str(error)
    try:
        endpoint = constants.ENDPOINT
        return Path(snapshot_download(repository, revision=revision, endpoint=endpoint, local_files_only=bool(offline)))
    except (errors.HTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        why = f"there is no cached copy from the hub ({offline})"
        if not offline:
            why = f"it could not be downloaded from the hub: {' '.join(str(error.__cause__ or error).split())[:200]}"
        raise UserError(f"{repository} is not a local folder, and {why}") from error


def check_release(key: str, place: str | None) -> None:
    """Raise UserError if the release that the setting `key` names does not exist; a name on the hub passes."""
    if place is not None and not Path(place).exists():
        name = NAME.fullmatch(place)
        if name is None or Path(name[1]).exists():
            raise UserError(f"{key}={place}: not found; give a folder, or OWNER/NAME on the hub")
