"""The page of `scripts/demo.py`, by gradio (Apache-2.0): fields, buttons, and what they show while a model works."""

import sys
import time
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gradio as gr

from corpora.synthetic.sentences import plain_sentences
from engine.errors import UserError, printable
from engine.progress import showing
from hicodit.pipeline import BUNDLED
from service.demo_actions import Demo, Made, in_page_words

EXAMPLES = BUNDLED.parent / "demo"
CLIPS = [str(EXAMPLES / name) for name in ("silent.mp4", "face_8.mp4", "face_24.mp4")]
VOICES = [str(EXAMPLES / name) for name in ("voice.wav", "voice_8.flac", "voice_24.flac")]
VOICE_NAMES = ["of face 1", "of face 2", "of face 3"]
PICTURE = str(EXAMPLES / "face.png")
SENTENCES = plain_sentences()[22:58:6]  # some of news, small talk and instructions
SPOKEN = {  # in the examples
    "silent.mp4": "place blue in whiskey six please",
    "face_8.mp4": "set red with india five again",
    "face_24.mp4": "lay green at alpha three now",
    "voice.wav": "set green at mike four again",
    "voice_8.flac": "place red by oscar zero now",
    "voice_24.flac": "lay white in india six now",
}
MODES = {
    "t2av": "a text becomes a talking face",
    "tts": "a text becomes speech",
    "a2v": "a face moves to a sound",
    "v2a": "a silent clip gets a voice",
}
KNOWN = (
    "The bundled models know drawn faces and computer voices like the examples, and any English sentence. "
    "Long and rare words are less clear than common ones. Real footage and other languages do not work with them."
)
OTHERS = "This page runs other weights than the bundled ones. The examples fit the bundled ones only."
HAS_GE2E = find_spec("resemblyzer") is not None  # of the eval extra: embeds a voice for HiCoDiT
READS_LIPS = find_spec("pocketsphinx") is not None  # of the eval extra: recognises the words of HiCoDiT's speech
PROGRESS = gr.Progress()  # as a default it makes gradio hand over that of the call
QUIET = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}  # events that take no time
CSS = "@media (max-width: 640px) {.gradio-container main {padding: 8px !important}}"


class Stopped(Exception):
    """The visitor pressed Stop, or closed the page."""


def looks(mode: str, source: str) -> dict[str, dict[str, Any]]:
    """Return visibility and labels of the page's parts; `source` of the face is "a clip" or "a picture"."""
    file = {"a2v": "the sound", "v2a": "the clip"}.get(mode)
    by_clip = mode == "v2a" or (mode != "tts" and source == "a clip")
    text = f"what {file} says" if file else "text to say"
    voice = "sound that the face moves to" if mode == "a2v" else "voice to speak with"
    if mode == "v2a" and READS_LIPS:
        text, voice = f"{text} (empty: read from the lips)", f"{voice} (empty: one that fits the face)"
    return {
        "text": {"label": text},
        "sentences": {"visible": not file},
        "voice": {"label": voice},
        "source": {"visible": mode in ("t2av", "a2v")},
        "clip": {"visible": by_clip, "label": "clip that gets the voice" if mode == "v2a" else "face"},
        "clips": {"visible": by_clip},
        "picture": {"visible": mode in ("t2av", "a2v") and not by_clip},
        "video": {"visible": mode != "tts"},
        "sound": {"visible": mode != "a2v"},
    }


def text_for(mode: str, text: str, voice: str | None, clip: str | None) -> str:
    """Return the text field after a change of mode or file: the words of an example where the mode needs them."""
    file = {"a2v": voice, "v2a": clip}.get(mode)
    if mode in ("t2av", "tts"):
        return SENTENCES[0] if text in SPOKEN.values() else text
    return SPOKEN.get(Path(file or "").name, "" if text in (*SENTENCES, *SPOKEN.values()) else text)


def page(demo: Demo) -> gr.Blocks:
    """Make the page, which `launch` opens."""
    stopped: set[str] = set()  # sessions whose run shall end
    with gr.Blocks(title="speaking-faces", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown(f"# speaking-faces\n{KNOWN if demo.bundled else OTHERS}")
        with gr.Tab("Speech for a clip"):
            _speech_tab(demo, stopped)
        with gr.Tab("Talking face"):
            _talk_tab(demo, stopped)

        def leave(request: gr.Request) -> None:
            stopped.add(request.session_hash)

        blocks.unload(leave)
    blocks.rules = CSS
    return blocks


def _speech_tab(demo: Demo, stopped: set[str]) -> None:
    with gr.Row():
        with gr.Column():
            clip = gr.Video(CLIPS[0], height=280, sources=["upload"], label="silent clip")
            gr.Examples([[path] for path in CLIPS], clip, label="example clips")
            with gr.Accordion("Another voice than one that fits the face", open=False, visible=HAS_GE2E):
                voice = _voice_field(None)
            settings = _settings(demo.hicodit.sampler, demo.hicodit.guidance.all, 128, 1.5)
        with gr.Column():
            buttons, status, outputs = _results("Speak", "clip with its speech")
            figure = gr.Image(
                label="mouth, spectrogram, tokens", show_label=False, interactive=False, buttons=["download"],
            )  # fmt: skip
    files = {"the clip": 0, "the voice": 1}
    _connect(stopped, demo.speak, [clip, voice, *settings], files, buttons, status, [*outputs, figure])


def _talk_tab(demo: Demo, stopped: set[str]) -> None:
    with gr.Row():
        with gr.Column():
            mode = gr.Radio([(words, name) for name, words in MODES.items()], value="t2av", label="what happens")
            text = gr.Textbox(SENTENCES[0], label="text to say", max_length=1000)
            sentences = gr.Examples([[sentence] for sentence in SENTENCES], text, label="example sentences")
            voice = _voice_field(VOICES[0])
            source = gr.Radio(["a clip", "a picture"], value="a clip", label="the face is in")
            clip = gr.Video(CLIPS[0], height=280, sources=["upload"], label="face")
            picture = gr.Image(
                PICTURE, type="filepath", image_mode=None, sources=["upload"], height=280, visible=False, label="face"
            )
            picture.preprocess = lambda file: file and file.path  # the reader of faces checks it, not gradio
            clips = gr.Examples([[path] for path in CLIPS], clip, label="example faces")
            settings = _settings(demo.talker.sampling, demo.talker.sampling.guidance, 50, 1.0)
        with gr.Column():
            buttons, status, outputs = _results("Talk", "talking face")
    parts = {
        "text": text, "sentences": sentences.dataset, "voice": voice, "source": source, "clip": clip,
        "clips": clips.dataset, "picture": picture, "video": outputs[0], "sound": outputs[1],
    }  # fmt: skip

    def talk(mode: str, text: str, voice: str, source: str, clip: str, picture: str, *rest: Any) -> Made:
        by_picture = source == "a picture" and mode in ("t2av", "a2v")
        return demo.talk(mode, text, voice, picture if by_picture else clip, *rest)

    def adapt(mode: str, source: str, text: str, voice: str | None, clip: str | None) -> dict[Any, Any]:
        updates = looks(mode, source)
        updates["text"]["value"] = text_for(mode, text, voice, clip)
        return {parts[name]: gr.update(**look) for name, look in updates.items()}

    for field in (mode, source, voice, clip):  # an example brings its own label along
        field.change(adapt, [mode, source, text, voice, clip], [*parts.values()], **QUIET)
    inputs, files = [mode, text, voice, source, clip, picture], {"the sound": 2, "the clip": 4, "the picture": 5}
    _connect(stopped, talk, [*inputs, *settings], files, buttons, status, outputs)


def _voice_field(value: str | None) -> gr.Audio:
    voice = gr.Audio(value, type="filepath", label="voice to speak with", buttons=[])
    gr.Examples([[path] for path in VOICES], voice, label="example voices", example_labels=VOICE_NAMES)
    return voice


def _settings(sampler: Any, guidance: float, steps: int, temperature: float) -> list[Any]:
    with gr.Accordion("Settings", open=False):
        return [
            gr.Slider(1, steps, sampler.steps, step=1, label="steps (more take longer)"),
            gr.Slider(0, temperature, sampler.temperature, step=0.05, label="temperature (0: always the likeliest)"),
            gr.Slider(0, 5.0, guidance, step=0.1, label="guidance (how closely the inputs are followed)"),
            gr.Number(0, precision=0, minimum=0, maximum=2**31 - 1, label="seed (another one, another result)"),
        ]


def _results(word: str, label: str) -> tuple[list[gr.Button], gr.Textbox, list[Any]]:
    with gr.Row():
        buttons = [gr.Button(word, variant="primary"), gr.Button("Stop", variant="stop", interactive=False)]
    status = gr.Textbox(f"Press {word}.", label="status", lines=1, max_lines=6, interactive=False)
    video = gr.Video(label=label, height=280, interactive=False, buttons=["download"])
    return buttons, status, [video, gr.Audio(label="speech alone", interactive=False, buttons=["download"])]


def _connect(
    stopped: set[str], action: Callable, inputs: list[Any], files: dict[str, int], buttons: list[Any], status: Any,
    outputs: list[Any],
) -> None:  # fmt: skip
    """Let the buttons run and stop `action`; `files` are its inputs that are files, by their names on the page."""
    idle = [gr.update(interactive=True), gr.update(interactive=False)]

    def begin(request: gr.Request) -> list[Any]:
        stopped.discard(request.session_hash)
        return [*reversed(idle), "Waits for its turn.", *[None] * len(outputs)]

    def run(request: gr.Request, progress=PROGRESS, *values: Any) -> list[Any]:
        def report(step: int, total: int | None, what: str) -> None:
            if request.session_hash in stopped:
                raise Stopped
            progress((step, total), desc=what, unit="")

        paths = {name: values[number] for name, number in files.items()}
        start, result = time.monotonic(), Made([])
        try:
            with showing(report):
                result = action(*values)
            notes = [*result.notes, f"done in {time.monotonic() - start:.1f} s"]
            note = " ".join(in_page_words(note, paths) for note in notes)
        except Stopped:
            note = "Stopped."
        except UserError as error:
            print(printable(f"error shown on the page: {error}"), file=sys.stderr, flush=True)
            note = f"This did not work. {in_page_words(str(error), paths)}"
        except Exception:
            traceback.print_exc()
            note = "This did not work: a fault of the program. The terminal of the server says more."
        return [*idle, note, *[result.video, result.sound, result.figure][: len(outputs)]]

    def stop(request: gr.Request) -> list[Any]:
        stopped.add(request.session_hash)
        return [*idle, "Stopped."]

    everything = [*buttons, status, *outputs]
    start = buttons[0].click(begin, None, everything, **QUIET)
    running = start.then(
        run, inputs, everything, show_progress_on=status, concurrency_id="models", api_name=action.__name__
    )
    buttons[1].click(stop, None, [*buttons, status], **QUIET, cancels=[running])  # also one that waits for its turn
