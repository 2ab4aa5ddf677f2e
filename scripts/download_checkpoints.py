"""Download the released checkpoints that this project can load; scripts/checkpoints.yaml lists them.

    python scripts/download_checkpoints.py GROUP --to DIR [--list]

Complete files are left alone, an interrupted download is resumed, and a file is verified before it gets its final name.
The licence of each file is printed without confirmation: by downloading a file you accept it.
"""

from __future__ import annotations

if __name__ == "__main__":
    import environment  # noqa: F401 -- before anything that may be missing

import sys
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_url

from engine.arguments import Parser
from engine.download import DamagedError, NoNetworkError, RemoteFile, check, fetch
from engine.errors import UserError, run_cli
from engine.files import writable
from engine.settings import require_range
from engine.untrusted import read_yaml, safe_name

CATALOGUE = Path(__file__).with_name("checkpoints.yaml")


Checkpoint = dict[str, Any]  # files that belong together: what they are, their licence, their origin, their `files`


def read_catalogue(path: Path = CATALOGUE) -> dict[str, list[Checkpoint]]:
    """Return the checkpoints by group."""
    groups = read_yaml(path)
    try:
        for rows in groups.values():
            if not isinstance(rows, list):
                raise TypeError("a group must be a list")
            for row in rows:
                row["files"] = [_remote_file(**file) for file in row["files"]]
                describe_checkpoint(row)  # KeyError if a part of its description is missing
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a catalogue of files ({error!r}): see {CATALOGUE}") from error
    return groups


def _remote_file(path: str, url="", repo="", name=None, revision=None, kind="model", **facts) -> RemoteFile:
    safe_name(path, "the path of a file", folders=True)
    if repo:
        url = hf_hub_url(repo, name or path, repo_type=kind, revision=revision)
    if not str(url).startswith(("http://", "https://")):
        raise UserError(f"{path}: url={url!r} is not an address: set url or repo")
    for name in ("size", "most", "about"):
        if facts.get(name) is not None:
            require_range(f"{path}: {name}", facts[name], 0, 2**50)
    return RemoteFile(path, url, **facts)


def describe_checkpoint(checkpoint: Checkpoint) -> str:
    """Return what a checkpoint is, its licence and its origin."""
    return "{what}\n    licence: {licence}\n    published at {origin}".format(**checkpoint)


def describe(file: RemoteFile, folder: Path) -> str:
    """Describe a file: whether it is present in `folder`, its size and its URL. A known digest is verified."""
    presence = "missing"
    if (folder / file.path).is_file():
        try:
            check(folder / file.path, file)
            presence = "present"
        except DamagedError:
            presence = "damaged"
    size = f"{file.size / 1e6:,.1f} MB" if file.size else "size unknown"
    size = f"about {file.about / 1e6:,.0f} MB" if file.about else size
    verified = "SHA-256 known" if file.sha256 else "no SHA-256 known"
    return f"{presence:8} {file.path} ({size}, {verified})\n        from {file.url}"


def process(checkpoints: list[Checkpoint], folder: Path, only_list: bool, retry_delay: float = 1.0) -> None:
    """List or download all files. A failed download does not stop the others."""
    failed = []
    for checkpoint in checkpoints:
        print(describe_checkpoint(checkpoint), flush=True)
        for file in checkpoint["files"]:
            try:
                if only_list:
                    line = describe(file, folder)
                else:
                    fetched = fetch(file, folder, retry_delay)
                    line = f"{'fetched' if fetched else 'already there'}: {folder / file.path}"
                print(f"    {line}", flush=True)
            except NoNetworkError:
                raise
            except UserError as error:
                failed.append(file.path)
                print(f"    failed: {file.path}: {error}", file=sys.stderr, flush=True)
    if failed:
        total = sum(len(checkpoint["files"]) for checkpoint in checkpoints)
        count = f"{len(failed)} of {total} files could not be downloaded"
        raise UserError(f"{count}: {', '.join(failed)}; run the command again to retry")


def main() -> None:
    parser = Parser(__doc__)
    groups = ", ".join(read_catalogue())
    parser.add_argument("group", nargs="?", help=f"{groups} or all (with --list, default: all)")
    parser.add_argument("--catalogue", type=Path, default=CATALOGUE, help="list of the files, e.g. of a mirror")
    parser.add_argument("--to", type=Path, default=Path("checkpoints"), help="download folder")
    parser.add_argument("--list", action="store_true", help="list the files and which are present; no download")
    args = parser.parse_args()
    catalogue = read_catalogue(args.catalogue)
    if args.group not in (None, "all", *catalogue):
        raise UserError(f"{args.group} is not a group; choose {', '.join([*catalogue, 'all'])}")
    if args.group is None and not args.list:
        raise UserError(f"choose a group: {', '.join([*catalogue, 'all'])}")
    if not args.list:
        with writable(args.to, "--to"):
            pass
    groups = [args.group] if args.group in catalogue else list(catalogue)
    checkpoints = [row for group in groups for row in catalogue[group]]
    process(checkpoints, args.to, args.list)


if __name__ == "__main__":
    run_cli(main)
