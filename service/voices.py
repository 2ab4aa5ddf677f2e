"""Named voices of the service: the recordings in a folder, kept as speaker embeddings."""

from __future__ import annotations

import tempfile
from pathlib import Path

from engine.errors import UserError
from talker_t2av.pipeline import TalkerPipeline
from talker_t2av.settings import SAVED_VOICE, is_voice

DEFAULT = "default"  # the bundled voice
VOICE_ALIASES = (  # OpenAI's names of voices
    "alloy", "ash", "ballad", "cedar", "coral", "echo", "fable", "marin", "nova", "onyx", "sage", "shimmer", "verse",
)  # fmt: skip


class Voices:
    """Voices by name, each a file of `talker_t2av.reference.save_voice`, which are read once at start-up.

    Args:
        folder: each recording (NAME.wav, ...) or saved voice (NAME.safetensors) in it is the voice NAME.
        default: recording of the voice `default`, unless the folder has one. None: no such voice.
        aliases: whether OpenAI's voice names are aliases of `default`, or of the first voice, if no file has that name.

    Raises:
        UserError: If a file in the folder is not a recording, or two files have the same name.
    """

    def __init__(
        self, talker: TalkerPipeline, folder: Path | None = None, default: Path | None = None, aliases: bool = False
    ) -> None:
        self.aliases = aliases
        self._embeddings = tempfile.TemporaryDirectory(prefix="voices-")  # deleted with the object
        self.files: dict[str, Path] = {}
        recordings: dict[str, Path] = {}
        for path in sorted(folder.iterdir()) if folder else ():
            if not path.is_file() or path.name.startswith("."):
                continue
            if (other := recordings.get(path.stem)) is not None:
                raise UserError(f"{other} and {path.name} are both the voice {path.stem}: rename one of them")
            recordings[path.stem] = path
        if default is not None:
            recordings.setdefault(DEFAULT, default)
        for name, path in recordings.items():
            if is_voice(path):
                self.files[name] = path
            else:
                self.files[name] = Path(self._embeddings.name, f"{name}{SAVED_VOICE}")
                talker.save_voice(path, self.files[name])

    @property
    def default(self) -> str:
        """Name of the voice for which OpenAI's names are aliases."""
        return DEFAULT if DEFAULT in self.files else min(self.files, default=DEFAULT)

    def is_alias(self, name: str) -> bool:
        """Return whether a name is an OpenAI voice name that is an alias of the default voice."""
        return self.aliases and name in VOICE_ALIASES and name not in self.files

    def remarks(self, name: str) -> list[str]:
        """Return one-line remarks about a requested voice: that another one is used, if the name is an alias."""
        return [f"voice {name} is not available: using {self.default}"] if self.is_alias(name) else []

    def find(self, name: str) -> Path:
        """Return the file of a voice.

        Raises:
            UserError: If the name is unknown.
        """
        if self.is_alias(name):
            name = self.default
        if name not in self.files:
            some = ", ".join(sorted(self.files)[:20]) or "none; start the service with --voices FOLDER"
            raise UserError(f"voice {name[:80]!r} is unknown; available: {some}")
        return self.files[name]
