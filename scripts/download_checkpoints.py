"""Download the released checkpoints that this project can load; configs/checkpoints.yaml lists them.

    python scripts/download_checkpoints.py talker_t2av|hicodit|metrics|metrics_large|all --to DIR [--list]

Complete files are left alone, an interrupted download is resumed, and a file is verified before it gets its final name.
The licence of each file is printed and not asked about: by downloading a file you accept it.
"""

from __future__ import annotations

if __name__ == "__main__":
    import environment  # noqa: F401 -- before anything that may be missing

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from engine.config import CONFIGS
from engine.download import DamagedError, HubFile, NoNetworkError, RemoteFile, check, fetch
from engine.errors import UserError, run_cli

CATALOGUE = CONFIGS / "checkpoints.yaml"


@dataclass(frozen=True)
class Checkpoint:
    """Files that belong together: what they are, their licence, where they were published."""

    what: str
    licence: str
    origin: str
    files: tuple[RemoteFile, ...]


def read_catalogue(path: Path = CATALOGUE) -> dict[str, tuple[Checkpoint, ...]]:
    """The checkpoints by group."""
    if not path.is_file():
        raise UserError(f"--catalogue {path}: no such file")
    groups = OmegaConf.to_container(OmegaConf.load(path))
    return {
        group: tuple(Checkpoint(**row | {"files": tuple(map(_remote_file, row["files"]))}) for row in rows)
        for group, rows in groups.items()
    }


def _remote_file(row: dict) -> RemoteFile:
    path, known = row.pop("path"), {key: row.pop(key, None) for key in ("size", "sha256", "about")}
    source = HubFile(**{"name": path} | row) if "repo" in row else row["url"]
    return RemoteFile(path, source, **known)


def presence(file: RemoteFile, folder: Path) -> str:
    """`missing`, `present` or `damaged`; a file with a known digest is read completely."""
    path = folder / file.path
    if not path.is_file():
        return "missing"
    try:
        check(path, file)
    except DamagedError:
        return "damaged"
    return "present"


def listing(checkpoints: tuple[Checkpoint, ...], folder: Path) -> list[str]:
    """Lines that say what the files are, their licence and source, how big they are and whether `folder` has them."""
    lines = []
    for checkpoint in checkpoints:
        lines += [checkpoint.what, f"    licence: {checkpoint.licence}", f"    published at {checkpoint.origin}"]
        for file in checkpoint.files:
            size = f"{file.size / 1e6:,.1f} MB" if file.size else "size unknown"
            size = f"about {file.about / 1e6:,.0f} MB" if file.about else size
            verified = "SHA-256 known" if file.sha256 else "no SHA-256 known"
            lines += [f"    {presence(file, folder):8} {file.path} ({size}, {verified})", f"        from {file.source}"]
    return lines


def download(checkpoints: tuple[Checkpoint, ...], folder: Path, retry_delay: float = 1.0) -> None:
    """Download all files; after one that fails, the others are still tried.

    Raises:
        NoNetworkError: there is no network.
        UserError: some files could not be downloaded; each was named on standard error.
    """
    failed, total = [], 0
    for checkpoint in checkpoints:
        print(f"{checkpoint.what}\n    licence: {checkpoint.licence} ({checkpoint.origin})", flush=True)
        for file in checkpoint.files:
            total += 1
            try:
                fetched = fetch(file, folder, retry_delay=retry_delay)
                print(f"    {'fetched' if fetched else 'already there'}: {folder / file.path}", flush=True)
            except NoNetworkError:
                raise
            except UserError as error:
                failed.append(file.path)
                print(
                    f"    failed: {file.path}: {error} (published at {checkpoint.origin})", file=sys.stderr, flush=True
                )
    if failed:
        raise UserError(f"{len(failed)} of {total} files could not be downloaded: {', '.join(failed)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", nargs="?", help="talker_t2av, hicodit, metrics or all (with --list, default: all)")
    parser.add_argument(
        "--catalogue", type=Path, default=CATALOGUE, help="list of the files, e.g. of a mirror (default: %(default)s)"
    )
    parser.add_argument("--to", type=Path, default=Path("checkpoints"), help="download folder (default: %(default)s)")
    parser.add_argument(
        "--list", action="store_true", help="list the files and whether they are present, without downloading"
    )
    args = parser.parse_args()
    catalogue = read_catalogue(args.catalogue)
    if args.group not in (None, "all", *catalogue):
        parser.error(f"{args.group} is no group: there are {', '.join([*catalogue, 'all'])}")
    if args.group is None and not args.list:
        parser.error(f"name a group: {', '.join([*catalogue, 'all'])}")
    checkpoints = catalogue.get(args.group) or sum(catalogue.values(), ())
    if args.list:
        print("\n".join(listing(checkpoints, args.to)))
    else:
        download(checkpoints, args.to)


if __name__ == "__main__":
    run_cli(main)
