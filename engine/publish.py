"""Publication of a release on the Hugging Face hub, with its codecs and a model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants, errors

from engine.errors import UserError
from engine.hub import LIBRARY, NAME, TASKS, release_folder
from engine.release import release_kind


def publish(
    folder: Path | None, codecs: Mapping[str, str | Path], repository: str, license: str | None, private: bool
) -> str:
    """Upload a release and return its URL. An existing repository gets a new commit.

    Args:
        folder: release folder. None if the model was loaded from other files.
        codecs: release folders of the codecs by name, which become subfolders of the repository.
        repository: OWNER/NAME.
        license: licence identifier of the hub, such as apache-2.0. None: the licence in the card.
        private: create the repository as private. An existing one keeps its visibility.

    Raises:
        UserError: If the model is not a release, no licence is stated, or the upload fails.
    """
    if not NAME.fullmatch(repository) or "@" in repository:
        raise UserError(f"{repository}: expected OWNER/NAME, without a revision")
    if folder is None:
        raise UserError("only release folders can be published: this model was loaded from other files")
    readme = folder / "README.md"
    card = ModelCard(readme.read_text() if readme.is_file() else f"# {repository}\n", ignore_metadata_errors=True)
    task, tags = TASKS.get(release_kind(folder), (None, ()))
    data = card.data
    data.license = license or data.license
    if not data.license:
        raise UserError(f"{readme} states no licence: set license=, as in license='apache-2.0'")
    data.library_name = data.library_name or LIBRARY
    data.pipeline_tag = data.pipeline_tag or task
    data.tags = sorted({*(data.tags or ()), *tags}) or None
    files = {path.name: path for path in folder.iterdir() if path.is_file() and path.name != "README.md"}
    for name, codec in codecs.items():
        codec = release_folder(codec)
        if not (codec / "config.yaml").is_file():
            raise UserError(f"{codec} is not a release folder: use codecs from release folders")
        files |= {f"{name}/{path.name}": path for path in codec.iterdir() if path.is_file()}
    additions = [CommitOperationAdd(name, path) for name, path in sorted(files.items())]
    additions.append(CommitOperationAdd("README.md", str(card).encode()))
    api = HfApi(constants.ENDPOINT)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.create_commit(repository, additions, commit_message=f"Release of {LIBRARY}")
    except (errors.HTTPError, OSError, ValueError) as error:
        why = " ".join(str(error).split())[:300]
        raise UserError(f"{repository} could not be published: {why}; hf auth login sets a token") from error
    return f"{constants.ENDPOINT}/{repository}"
