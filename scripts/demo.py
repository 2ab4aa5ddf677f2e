"""Try the models in a browser on this machine: `python scripts/demo.py` (needs the demo extra).

One tab generates speech for a silent clip, the other a talking face from a text. The fields start with the bundled
files. Only this machine can open the page, unless --host allows others; no data is sent to other servers.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import cached_property, wraps
from pathlib import Path
from typing import Any

from engine.errors import UserError, run_cli
from engine.media.audio import read_audio
from engine.metrics.speaker import GE2EEncoder
from engine.optional import require
from engine.seeding import check_seed
from engine.training.distributed import pick_device
from hicodit.inference import write_outputs as write_speech
from hicodit.pipeline import BUNDLED, HiCoDiTPipeline
from talker_t2av.inference import write_outputs as write_talk
from talker_t2av.jobs import Job
from talker_t2av.pipeline import TalkerPipeline
from talker_t2av.system import BUNDLED as BUNDLED_TALKER

EXAMPLES = BUNDLED.parent / "demo"
CLIP, VOICE = str(EXAMPLES / "silent.mp4"), str(EXAMPLES / "voice.wav")
MODES = [
    ("a text becomes a talking face (t2av)", "t2av"),
    ("a text becomes speech (tts)", "tts"),
    ("a face moves to the sound (a2v)", "a2v"),
    ("the clip gets a voice (v2a)", "v2a"),
]


class Demo:
    """What the buttons do. A model is loaded when it is first asked for.

    Args:
        folder: every call writes its files into a new folder in it.
        weights, talker: release folders of HiCoDiT and Talker-T2AV.
    """

    def __init__(
        self, folder: Path, weights: str | Path = BUNDLED, talker: str | Path = BUNDLED_TALKER, device: str = "auto"
    ) -> None:
        self._folder, self._device = folder, pick_device(device)
        self._weights, self._talker_weights = weights, talker

    @cached_property
    def hicodit(self) -> HiCoDiTPipeline:
        return HiCoDiTPipeline.from_pretrained(self._weights, self._device)

    @cached_property
    def talker(self) -> TalkerPipeline:
        return TalkerPipeline.from_pretrained(self._talker_weights, self._device)

    def _new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self._folder))

    def speak(
        self, clip: str | None, voice: str | None, steps: float, temperature: float, seed: float
    ) -> tuple[str, str]:
        """The clip with its new sound, and a figure of the mouth, the spectrogram and the tokens.

        Raises:
            UserError: as `HiCoDiTPipeline` does, or no clip was given.
        """
        if not clip:
            raise UserError("give a clip of a talking face")
        check_seed(int(seed))
        identity = GE2EEncoder().embed(read_audio(voice, 16_000), 16_000) if voice else None
        speech = self.hicodit(clip, int(seed), identity, steps=int(steps), temperature=float(temperature))
        video, drawing, _ = write_speech(Path(clip), speech, self._new_folder(), figure=True)  # by name; the last: .wav
        return str(video), str(drawing)

    def talk(
        self, mode: str, text: str, voice: str | None, face: str | None, seed: float
    ) -> tuple[str | None, str | None]:
        """The video, or the sound of tts; `voice` is also the sound of a2v, `face` the clip of v2a.

        Raises:
            UserError: as `Job` and `TalkerPipeline` do.
        """
        check_seed(int(seed))
        fields = {
            "t2av": {"reference_audio": voice, "reference_video": face},
            "tts": {"reference_audio": voice},
            "a2v": {"audio": voice, "reference_video": face},
            "v2a": {"reference_audio": voice, "video": face},
        }[mode]
        job = Job(mode, text or "", seed=int(seed), **{name: path for name, path in fields.items() if path})
        folder = self._new_folder()
        names = write_talk(job, mode, self.talker(job), folder)
        made = str(folder / names[-1])
        return (None, made) if mode == "tts" else (made, None)


def page(gr: Any, demo: Demo) -> Any:
    """The page, by gradio (Apache-2.0); `gr` is the package."""

    def with_shown_errors(action: Callable) -> Callable:
        @wraps(action)
        def wrapper(*given: Any) -> Any:
            try:
                return action(*given)
            except UserError as error:
                raise gr.Error(str(error), print_exception=False) from error

        return wrapper

    with gr.Blocks(title="speaking-faces", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        with gr.Tab("A silent clip speaks (HiCoDiT)"):
            with gr.Row():
                with gr.Column():
                    clip = gr.Video(CLIP, height=280, label="clip of a talking face; its sound is not listened to")
                    voice = gr.Audio(type="filepath", label="a voice instead of the face's (needs the eval extra)")
                    steps = gr.Slider(1, 128, demo.hicodit.sampler.steps, step=1, label="sampling steps")
                    temperature = gr.Slider(0, 1.5, demo.hicodit.sampler.temperature, label="temperature")
                    seed = gr.Number(0, precision=0, label="seed")
                    button = gr.Button("Speak", variant="primary")
                with gr.Column():
                    spoken, figure = gr.Video(label="with its speech"), gr.Image(label="mouth, spectrogram, tokens")
            button.click(with_shown_errors(demo.speak), [clip, voice, steps, temperature, seed], [spoken, figure])
        with gr.Tab("A face talks (Talker-T2AV)"):
            with gr.Row():
                with gr.Column():
                    mode = gr.Radio(MODES, value="t2av", label="what happens")
                    text = gr.Textbox("set blue by hotel four now", label="text")
                    voice = gr.Audio(VOICE, type="filepath", label="voice; of a2v the sound")
                    face = gr.Video(CLIP, height=280, label="face; of v2a the clip")
                    seed = gr.Number(0, precision=0, label="seed")
                    button = gr.Button("Talk", variant="primary")
                with gr.Column():
                    video, sound = gr.Video(label="talking face"), gr.Audio(label="speech")
            button.click(with_shown_errors(demo.talk), [mode, text, voice, face, seed], [video, sound])
    return blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default=BUNDLED, help="HiCoDiT's release folder (default: the bundled one)")
    parser.add_argument(
        "--talker", default=BUNDLED_TALKER, help="Talker-T2AV's release folder (default: the bundled one)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default: %(default)s)")
    args = parser.parse_args()
    if not 0 < args.port < 65_536:
        raise UserError(f"--port {args.port} must lie between 1 and 65535")
    gr = require("gradio", "gradio", "demo")
    with tempfile.TemporaryDirectory() as folder:
        demo = Demo(Path(folder), args.weights, args.talker, args.device)
        try:
            shown = page(gr, demo)
            shown.launch(
                server_name=args.host, server_port=args.port, share=False, show_error=True, quiet=True,
                prevent_thread_lock=True,
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"cannot listen on {args.host}:{args.port}: give another --port") from error
        print(f"open http://{args.host}:{args.port} in a browser; Ctrl-C ends", flush=True)
        shown.block_thread()


if __name__ == "__main__":
    run_cli(main)
