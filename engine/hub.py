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
    """The folder `place`, or, where there is none, the local copy of the hub's repository of that name.

    OWNER/NAME is looked for on the hub only if there is neither such a folder nor a folder OWNER here: a mistyped path
    stays a path. Without a network, a copy that an earlier call brought is taken. OWNER/NAME@REVISION takes a branch,
    tag or commit. A bundled release, assets/NAME, is found from every folder.

    Raises:
        UserError: the hub has no such repository or does not give it, or cannot be reached and nothing was kept.
    """
    name = NAME.fullmatch(str(place))
    if name is None or Path(place).exists() or Path(name[1]).exists():
        return Path(place)
    if name[1] == "assets" and (CHECKOUT / place).is_dir():
        return CHECKOUT / place
    return _fetched(f"{name[1]}/{name[2]}", name[3])


@lru_cache
def _fetched(repository: str, revision: str | None) -> Path:
    why = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        try:
            check_reachable(constants.ENDPOINT)
            return Path(snapshot_download(repository, revision=revision, endpoint=constants.ENDPOINT))
        except NoNetworkError as error:
            why = str(error)
        except (errors.HTTPError, errors.LocalEntryNotFoundError, OSError) as error:
            reason = " ".join(str(error.__cause__ or error).split())[:200]
            raise UserError(
                f"{repository} is not a local folder and could not be downloaded from the hub: {reason}"
            ) from error
    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (errors.LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{repository} is not a local folder, and there is no cached copy from the hub ({why})"
        ) from error


def check_release(key: str, place: str | None) -> None:
    """Look for a release that a setting names, without loading it; a name on the hub passes.

    Raises:
        UserError: there is no such folder or file.
    """
    if place is not None and not Path(place).exists():
        name = NAME.fullmatch(place)
        if name is None or Path(name[1]).exists():
            raise UserError(f"{key}={place}: not found; give a folder, or OWNER/NAME on the hub")
