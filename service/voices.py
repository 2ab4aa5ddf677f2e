"""Named voices of the service: recordings in a folder, and recordings that clients upload, kept as embeddings."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

from engine.errors import UserError
from engine.untrusted import safe_name
from talker_t2av.pipeline import TalkerPipeline
from talker_t2av.settings import SAVED_VOICE, is_voice

DEFAULT = "default"  # the bundled voice
MAX_VOICES = 1000


class Voices:
    """Voices by name, each a file of `talker_t2av.speaker.voice`.

    Args:
        folder: its recordings (NAME.wav, ...) and saved voices (NAME.safetensors) are the voices; uploaded ones are
            saved there. None: uploaded ones are lost when the service ends.
        default: a recording of the voice that is always there; None: there is none.
    """

    def __init__(self, talker: TalkerPipeline, folder: Path | None = None, default: Path | None = None) -> None:
        self.talker, self.lock = talker, threading.Lock()
        self._scratch = tempfile.TemporaryDirectory(prefix="voices-")
        self.folder = folder or Path(self._scratch.name)
        self.files: dict[str, Path] = {}
        if default is not None:
            self._save(DEFAULT, default, Path(self._scratch.name))
        for path in sorted(folder.iterdir()) if folder else ():
            if path.is_file() and not path.name.startswith(".") and path.stem not in self.files:
                if is_voice(path):
                    self.files[path.stem] = path
                else:
                    self._save(path.stem, path, Path(self._scratch.name))

    def add(self, name: str, recording: Path) -> None:
        """Save the voice of a recording."""
        safe_name(name, "the voice's name")
        with self.lock:
            if name in self.files:
                raise UserError(f"there is a voice {name!r} already: delete it first, or choose another name")
            if len(self.files) >= MAX_VOICES:
                raise UserError(f"there are {MAX_VOICES} voices: delete one first")
            self._save(name, recording, self.folder)

    def remove(self, name: str) -> None:
        """Delete an uploaded voice."""
        with self.lock:
            if self.find(name).parent != self.folder:
                raise UserError(f"voice {name!r} belongs to the service and stays")
            self.files.pop(name).unlink(missing_ok=True)

    def find(self, name: str) -> Path:
        """Return the file of a voice."""
        if name not in self.files:
            some = ", ".join(sorted(self.files)[:20]) or "none; upload one at /v1/audio/voices"
            raise UserError(f"voice {name[:80]!r} is unknown; there are: {some}")
        return self.files[name]

    def _save(self, name: str, recording: Path, folder: Path) -> None:
        self.talker.save_voice(recording, folder / f"{name}{SAVED_VOICE}")
        self.files[name] = folder / f"{name}{SAVED_VOICE}"
