"""A stand-in of the Hugging Face hub in a folder, where huggingface_hub would send requests."""

from pathlib import Path
from unittest.mock import create_autospec

import pytest
from huggingface_hub import HfApi, constants, errors, snapshot_download

from engine import hub
from engine.download import check_reachable


def use_endpoint(monkeypatch, address):
    """Let the client use another hub; whether it can be reached is asked again."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr("engine.download.check_reachable", check_reachable.__wrapped__)


@pytest.fixture
def stand_in_hub(monkeypatch, tmp_path):
    """The folder of a stand-in hub, which has the files of a repository in OWNER/NAME."""
    root = tmp_path / "hub"

    def download(repository, revision, endpoint, local_files_only):
        if not (root / repository).is_dir():
            raise errors.LocalEntryNotFoundError(f"{endpoint} has no {repository}")
        return str(root / repository)

    def commit(api, repository, operations, commit_message):
        for operation in operations:
            path = root / repository / operation.path_in_repo
            content = operation.path_or_fileobj
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else Path(content).read_bytes())

    monkeypatch.setattr(hub, "snapshot_download", create_autospec(snapshot_download, side_effect=download))
    monkeypatch.setattr(HfApi, "create_repo", create_autospec(HfApi.create_repo))
    monkeypatch.setattr(HfApi, "create_commit", create_autospec(HfApi.create_commit, side_effect=commit))
    monkeypatch.setattr("engine.download.check_reachable", create_autospec(check_reachable))
    monkeypatch.chdir(tmp_path)
    hub._snapshot.cache_clear()
    yield root
    hub._snapshot.cache_clear()
