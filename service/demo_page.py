"""The page of `scripts/demo.py`, built with gradio (Apache-2.0): fields, buttons, progress and results."""

import math
import re
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gradio as gr

from corpora.synthetic.sentences import plain_sentences
from engine.errors import UserError, printable
from engine.progress import showing
from hicodit.pipeline import BUNDLED
from service.demo_actions import MAX_CHARACTERS, MAX_SECONDS, Demo, Made, faulty_field, in_page_words
from talker_t2av.model import FPS, MAX_FRAMES

EXAMPLES = BUNDLED.parent / "demo"
CLIPS = [str(EXAMPLES / name) for name in ("silent.mp4", "face_8.mp4", "face_24.mp4")]
VOICES = [str(EXAMPLES / name) for name in ("voice.wav", "voice_8.flac", "voice_24.flac")]
VOICE_NAMES = ["Of face 1", "Of face 2", "Of face 3"]
PICTURE = str(EXAMPLES / "face.png")
SENTENCES = plain_sentences()[22:58:6]  # a selection of news, small talk and instructions
SPOKEN = {  # transcripts of the examples
    "silent.mp4": "place blue in whiskey six please",
    "face_8.mp4": "set red with india five again",
    "face_24.mp4": "lay green at alpha three now",
    "voice.wav": "set green at mike four again",
    "voice_8.flac": "place red by oscar zero now",
    "voice_24.flac": "lay white in india six now",
}
MODES = {
    "t2av": "Text to talking face",
    "tts": "Text to speech",
    "a2v": "Audio to talking face",
    "v2a": "Silent clip to speech",
}
LINES = {  # description of each task
    "speak": "Input: a clip of a talking face; its audio is not used. Output: the clip with generated speech.",
    "t2av": "Input: a text, a photo or clip of a face, a recording of a voice. Output: the face saying the text.",
    "tts": "Input: a text and a recording of a voice. Output: the text spoken in that voice.",
    "a2v": "Input: audio, and a photo or clip of a face. Output: a video of that face, lip-synced to the audio.",
    "v2a": "Input: a silent clip, its transcript, a recording of a voice. Output: the clip with generated speech.",
}
FACE_FILES = {"the clip": "the face", "the photo": "the face"}  # files of one field
# sources of the face
PHOTO = "Photo"
CLIP = "Clip"
KNOWN = (
    "The bundled models support cartoon faces with synthetic voices, such as the examples, and videos of people who "
    "speak sentences of the GRID corpus. Talking faces can say any English sentence. Other languages, and other "
    "sentences in videos of people, are not supported."
)
OTHERS = "This page uses custom weights. The examples are intended for the bundled weights."
CONSENT = "Use only faces and voices of people who have given their consent."
REFERENCE_SECONDS = MAX_FRAMES // FPS  # maximum length of driving audio
HAS_GE2E = find_spec("resemblyzer") is not None  # installed by the extra eval; embeds a reference voice for HiCoDiT
PROGRESS = gr.Progress()  # as a default argument, it is replaced by the progress bar of the call
QUIET = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}  # events that take no time
STAGES = {"conditions": "Encoding the face", "decoding": "Decoding audio and video"}  # by name in the program
SHARES = {  # fraction of the total time, by a phrase in the name of the stage
    "finding the face": 0.15,
    "cutting out": 0.1,
    "reading": 0.05,
    "conditions": 0.05,
    "sampling": 0.45,
    "decoding": 0.15,
    "writing": 0.05,
}
USUAL = 0.2  # the usual length of speech is about twice this fraction of the maximum
HEIGHT = 280  # height of images and videos in pixels
CSS = """
.status {border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 8px 12px; min-height: 4.5em}
.status.busy {color: transparent; border-color: transparent}
.status.done {border-color: #15803d}
.status.error {border-color: #b91c1c}
.status.error, .field-error {color: #b91c1c; font-weight: 600}
.dark .status.error, .dark .field-error {color: #fca5a5}
.block:has(+ .block .field-error), .form:has(+ .block .field-error) textarea {outline: 2px solid #b91c1c}
.input-file span.error {visibility: hidden}
@media (max-width: 640px) {
    .gradio-container main {padding: 8px !important}
    .input-file {height: 200px !important}
}
"""
# A clip that the browser cannot play is replaced by a converted copy; the error shown until then is hidden.
SCRIPT = """() => new MutationObserver(() => document.querySelectorAll(".toast-body").forEach(toast => {
    if (toast.innerText.includes("Video not playable")) toast.style.display = "none";
})).observe(document.body, {childList: true, subtree: true})"""
SCROLL = """() => document.getElementById("NAME").scrollIntoView(
    {behavior: "smooth", block: window.innerWidth < 640 ? "start" : "nearest"})"""
SCROLL_TO_ERROR = """() => setTimeout(() => {
    const lines = [...document.querySelectorAll(".field-error")];
    lines.find(line => line.offsetParent)?.scrollIntoView({behavior: "smooth", block: "center"});
}, 300)"""


class Stopped(Exception):
    """The visitor pressed Stop, or closed the page."""


@dataclass
class Tab:
    """A tab: its action, inputs and outputs.

    Attributes:
        word: label of the button that starts the action.
        action: called with the values of `inputs`.
        files: indices into `inputs` of the inputs that are files, by their name on the page.
        errors: component that shows the error message of each field, by name of the field.
    """

    name: str
    word: str
    action: Callable[..., Made]
    inputs: list[Any]
    files: dict[str, int]
    errors: dict[str, gr.HTML]
    buttons: list[gr.Button]
    status: gr.HTML
    outputs: list[Any]

    @property
    def shown(self) -> list[Any]:
        """Components that are updated by a result."""
        return [self.status, *self.errors.values(), *self.outputs]

    def show(self, kind: str, text: str, wrong: str = "", made: Made | None = None) -> list[Any]:
        """Return the values of `shown`.

        Args:
            kind: kind of the status: idle, busy, done or error.
            text: status, or error message of a field.
            wrong: name of the invalid field.
            made: result of the action; None: no result.
        """
        made = made or Made([])
        lines = [
            gr.update(value=f'<div class="field-error" role="alert">{escape(text)}</div>', visible=True)
            if name == wrong
            else gr.update(value="", visible=False)
            for name in self.errors
        ]
        files = [made.video, made.sound, made.figure][: len(self.outputs)]
        return [status_line(kind, f"Invalid input: see {wrong}, marked in red." if wrong else text), *lines, *files]


def status_line(kind: str, text: str) -> str:
    """Return the HTML of a status message. `kind` is its CSS class, such as busy or error."""
    return f'<div class="status {kind}" role="status">{escape(text)}</div>'


def part_settings(mode: str, source: str) -> dict[str, dict[str, Any]]:
    """Return visibility and labels of the page's parts; `source` of the face is `CLIP` or `PHOTO`."""
    file = {"a2v": "the audio", "v2a": "the clip"}.get(mode)
    has_source = mode in ("t2av", "a2v")
    by_clip = mode == "v2a" or (has_source and source == CLIP)
    text = f"Transcript of {file}" if file else "Text"
    voice = f"Reference voice (up to {MAX_SECONDS:.0f} s; the first 30 s are used)"
    if mode == "a2v":
        voice = f"Driving audio (up to {REFERENCE_SECONDS} s)"
    clip = f"Silent clip (up to {REFERENCE_SECONDS} s)" if mode == "v2a" else "Clip of the face"
    return {
        "line": {"value": LINES[mode]},
        "text": {"label": f"{text}, up to {MAX_CHARACTERS:,} characters"},
        "sentences": {"visible": not file},
        "voice": {"label": voice},
        "source": {"visible": has_source},
        "clip": {"visible": by_clip, "label": clip},
        "clips": {"visible": by_clip},
        "picture": {"visible": has_source and not by_clip},
        "video": {"visible": mode != "tts"},
        "sound": {"visible": mode != "a2v"},
    }


def text_for(mode: str, text: str, voice: str | None, clip: str | None) -> str:
    """Return the text field after a change of mode or file: the text of an example if the mode requires one."""
    file = {"a2v": voice, "v2a": clip}.get(mode)
    if mode in ("t2av", "tts"):
        return SENTENCES[0] if text in SPOKEN.values() else text
    return SPOKEN.get(Path(file or "").name, "" if text in (*SENTENCES, *SPOKEN.values()) else text)


def page(demo: Demo) -> gr.Blocks:
    """Create the page, which `launch` opens."""
    stopped: set[str] = set()  # see `TabEvents`
    with gr.Blocks(title="speaking-faces", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown(f"# speaking-faces\n{KNOWN if demo.bundled else OTHERS} **{CONSENT}**")
        with gr.Tab("Speech for a clip"):
            _speech_tab(demo, stopped)
        with gr.Tab("Talking face"):
            _talk_tab(demo, stopped)

        def leave(request: gr.Request) -> None:
            stopped.add(request.session_hash)

        blocks.unload(leave)
    return blocks


def _speech_tab(demo: Demo, stopped: set[str]) -> None:
    gr.Markdown(LINES["speak"])
    with gr.Row():
        with gr.Column():
            clip = _clip_field(demo, f"Clip of a talking face (up to {MAX_SECONDS:.0f} s)")
            clip_error = _error_line()
            buttons = _buttons("Speak")
            gr.Examples([[path] for path in CLIPS], clip, label="Example clips")
            with gr.Accordion("Reference voice (default: predicted from the face)", open=False, visible=HAS_GE2E):
                voice = _voice_field(None)
                voice_error = _error_line()
            settings = _settings(demo.hicodit.sampler, demo.hicodit.guidance.all, 128, 1.5)
        with gr.Column():
            status, outputs = _results("speak", "Speak", "Clip with generated speech")
            figure = gr.Image(
                label="Mouth crops, spectrogram, tokens", show_label=False, interactive=False, buttons=["download"],
            )  # fmt: skip
    files = {"the clip": 0, "the voice": 1}
    errors = {"the clip": clip_error, "the voice": voice_error}
    inputs = [clip, voice, *settings]
    tab = Tab("speak", "Speak", demo.speak, inputs, files, errors, buttons, status, [*outputs, figure])
    _connect(demo, tab, [buttons[0].click], stopped)


def _talk_tab(demo: Demo, stopped: set[str]) -> None:
    start = part_settings("t2av", PHOTO)
    line = gr.Markdown(LINES["t2av"])
    with gr.Row():
        with gr.Column():
            mode = gr.Radio([(words, name) for name, words in MODES.items()], value="t2av", label="Task")
            text = gr.Textbox(SENTENCES[0], lines=1, max_lines=6, max_length=MAX_CHARACTERS, **start["text"])
            text_error = _error_line()
            buttons = _buttons("Talk")
            sentences = gr.Examples([[sentence] for sentence in SENTENCES], text, label="Example sentences")
            source = gr.Radio([PHOTO, CLIP], value=PHOTO, label="Source of the face")
            picture = gr.Image(
                PICTURE, type="filepath", image_mode=None, sources=["upload"], height=HEIGHT, label="Photo of the face",
                elem_classes="input-file", **start["picture"],
            )  # fmt: skip
            picture.preprocess = lambda file: file and file.path  # the reader of faces checks it, not gradio
            clip = _clip_field(demo, **start["clip"])
            face_error = _error_line()
            clips = gr.Examples([[path] for path in CLIPS], clip, label="Example clips", **start["clips"])
            voice = _voice_field(VOICES[0])
            voice_error = _error_line()
            settings = _settings(demo.talker.sampling, demo.talker.sampling.guidance, 50, 1.0)
        with gr.Column():
            status, outputs = _results("talk", "Talk", "Talking face")
    parts = {
        "line": line, "text": text, "sentences": sentences.dataset, "voice": voice, "source": source, "clip": clip,
        "clips": clips.dataset, "picture": picture, "video": outputs[0], "sound": outputs[1],
    }  # fmt: skip

    def talk(mode: str, text: str, voice: str, source: str, clip: str, picture: str, *rest: Any) -> Made:
        by_picture = source == PHOTO and mode in ("t2av", "a2v")
        return demo.talk(mode, text, voice, picture if by_picture else clip, *rest)

    def adapt(mode: str, source: str, text: str, voice: str | None, clip: str | None) -> dict[Any, Any]:
        updates = part_settings(mode, source)
        updates["text"]["value"] = text_for(mode, text, voice, clip)
        return {parts[name]: gr.update(**look) for name, look in updates.items()}

    for changed in (mode, source, voice, clip):  # an example brings its own label along
        changed.change(adapt, [mode, source, text, voice, clip], [*parts.values()], **QUIET)
    inputs = [mode, text, voice, source, clip, picture, *settings]
    files = {"the voice": 2, "the clip": 4, "the photo": 5}
    errors = {"the text": text_error, "the voice": voice_error, "the face": face_error}
    tab = Tab("talk", "Talk", talk, inputs, files, errors, buttons, status, outputs)
    _connect(demo, tab, [buttons[0].click, text.submit], stopped)


def _clip_field(demo: Demo, label: str, visible: bool = True) -> gr.Video:
    clip = gr.Video(
        CLIPS[0], height=HEIGHT, sources=["upload"], label=label, visible=visible, elem_classes="input-file"
    )
    clip.upload(demo.preview, clip, clip, queue=False, show_progress="minimal", api_visibility="private")
    return clip


def _voice_field(value: str | None) -> gr.Audio:
    label = part_settings("t2av", PHOTO)["voice"]["label"]
    voice = gr.Audio(value, type="filepath", sources=["upload", "microphone"], label=label, buttons=[])
    gr.Examples([[path] for path in VOICES], voice, label="Example voices", example_labels=VOICE_NAMES)
    return voice


def _settings(sampler: Any, guidance: float, steps: int, temperature: float) -> list[Any]:
    with gr.Accordion("Settings", open=False):
        return [
            gr.Slider(1, steps, sampler.steps, step=1, label="Sampling steps"),
            gr.Slider(0, temperature, sampler.temperature, step=0.05, label="Temperature (0: most likely tokens)"),
            gr.Slider(0, 5.0, guidance, step=0.1, label="Guidance scale"),
            gr.Number(0, precision=0, minimum=0, maximum=2**31 - 1, label="Random seed"),
        ]


def _error_line() -> gr.HTML:
    return gr.HTML(visible=False)


def _buttons(word: str) -> list[gr.Button]:
    with gr.Row():
        return [gr.Button(word, variant="primary", scale=4), gr.Button("Stop", scale=0, min_width=80, **STOP[False])]


STOP = {  # by whether there is a run
    False: {"variant": "secondary", "size": "sm", "interactive": False},
    True: {"variant": "stop", "size": "lg", "interactive": True},
}


def _button_updates(is_running: bool) -> list[dict[str, Any]]:
    return [gr.update(interactive=not is_running), gr.update(**STOP[is_running])]


def _results(name: str, word: str, label: str) -> tuple[gr.HTML, list[Any]]:
    status = gr.HTML(status_line("idle", f"Press {word}."), elem_id=f"{name}-status")
    video = gr.Video(label=label, height=HEIGHT, interactive=False, buttons=["download"])
    return status, [video, gr.Audio(label="Audio", interactive=False, buttons=["download"])]


class RunProgress:
    """Progress of a run, computed from the stages that it reports."""

    def __init__(self) -> None:
        self.done = 0.0

    def at(self, step: int, total: int | None, what: str) -> tuple[float, str]:
        """Return the completed fraction of the run, which never decreases, and a description of the stage."""
        begin = 0.0
        for words, share in SHARES.items():
            if words in what:
                self.done = max(self.done, begin + share * self._fraction(step, total, what))
                break
            begin += share
        bound = _bound(what)
        if bound and total:
            return self.done, f"Generating: {step / total * bound:.1f} s of at most {bound} s"
        line = STAGES.get(what, what)
        return self.done, line[:1].upper() + line[1:]

    def _fraction(self, step: int, total: int | None, what: str) -> float:
        """Return the completed fraction of a stage, which approaches 1 exponentially if its length is unknown."""
        if not total:
            return 0.0
        return 1 - math.exp(-step / total / USUAL) if _bound(what) else step / total


def _bound(what: str) -> float | None:
    """Return the maximum length in seconds that a stage may generate, if only the maximum is known."""
    bound = re.search(r"sampling at most ([\d.]+) s", what)
    return float(bound[1]) if bound else None


class TabEvents:
    """Handlers of the events of a tab, which gradio calls with the session of the visitor.

    Args:
        stopped: sessions that have left, and runs that shall end, of all tabs.

    Attributes:
        everything: components that `begin` and `run` update.
        working: sessions that wait for a result.
        changed: sessions in `working` whose inputs have changed since they started.
        pressed: sessions in `working` in which Enter was pressed again.
    """

    def __init__(self, demo: Demo, tab: Tab, stopped: set[str]) -> None:
        self.demo = demo
        self.tab = tab
        self.stopped = stopped
        self.everything = [*tab.buttons, *tab.shown]
        self.working: set[str] = set()
        self.changed: set[str] = set()
        self.pressed: set[str] = set()

    def begin(self, request: gr.Request) -> list[Any]:
        """Show that a run begins. A session that already has one keeps it."""
        session = request.session_hash
        if session in self.working:
            self.pressed.add(session)
            return [gr.skip()] * len(self.everything)
        self.stopped.difference_update((session, self._run_of(session)))
        self.changed.discard(session)
        self.pressed.discard(session)
        self.working.add(session)
        return [*_button_updates(True), *self.tab.show("busy", "Working.")]

    def run(self, request: gr.Request, progress=PROGRESS, *values: Any) -> list[Any]:
        """Run the action on the values of the inputs, and show its result or error."""
        session = request.session_hash
        if session in self.pressed:  # one run is enough
            self.pressed.discard(session)
            return [gr.skip()] * len(self.everything)
        run_progress = RunProgress()

        def report(step: int, total: int | None, what: str) -> None:
            if not self.stopped.isdisjoint((session, self._run_of(session))):
                raise Stopped
            done, line = run_progress.at(step, total, what)
            progress(done, desc=line)

        try:
            with showing(report):
                shown = self._result(session, list(values))
        finally:
            self.working.discard(session)
        return [*_button_updates(False), *shown]

    def stop(self, request: gr.Request) -> list[Any]:
        """End the run of a session, also one that waits for its turn."""
        self.stopped.add(self._run_of(request.session_hash))
        self.working.discard(request.session_hash)
        return [*_button_updates(False), status_line("idle", "Stopped.")]

    def reset(self, value: Any, request: gr.Request) -> list[Any]:
        """Clear outdated results after the change of an input to `value`. During a run, only note the change."""
        if request.session_hash in self.working:
            if not (isinstance(value, str) and self.demo.original(value) != value):  # a copy is no new clip
                self.changed.add(request.session_hash)
            return [gr.skip()] * len(self.tab.shown)
        return self.tab.show("idle", f"Press {self.tab.word}.")

    def _run_of(self, session: str) -> str:
        """Return the name of a session's run in this tab, as another tab may have one, too."""
        return f"{session} {self.tab.name}"

    def _result(self, session: str, values: list[Any]) -> list[Any]:
        """Return what is shown after the action."""
        tab = self.tab
        for number in tab.files.values():
            values[number] = self.demo.original(values[number])
        paths = {name: values[number] for name, number in tab.files.items()}
        start = time.monotonic()
        try:
            made = tab.action(*values)
        except Stopped:
            return tab.show("idle", "Stopped.")
        except UserError as error:
            print(printable(f"error shown on the page: {error}"), file=sys.stderr, flush=True)
            wrong = faulty_field(error, paths)
            if wrong not in tab.errors:
                wrong = FACE_FILES.get(wrong, "")
            return tab.show("error", in_page_words(str(error), paths), wrong)
        except Exception:
            traceback.print_exc()
            return tab.show("error", "Internal error. See the log of the server for details.")
        notes = [*made.notes, f"done in {time.monotonic() - start:.1f} s"]
        if session in self.changed:
            notes.append("the inputs were changed during the run")
        return tab.show("done", " ".join(in_page_words(note, paths) for note in notes), made=made)


def _connect(demo: Demo, tab: Tab, triggers: list[Any], stopped: set[str]) -> None:
    """Connect the events: triggers start the action, Stop ends it, and a changed input clears outdated results."""
    events = TabEvents(demo, tab, stopped)
    start = gr.on(triggers, events.begin, None, events.everything, **QUIET)
    gr.on(triggers, None, None, None, js=SCROLL.replace("NAME", f"{tab.name}-status"), **QUIET)
    running = start.then(
        events.run, tab.inputs, events.everything, show_progress_on=tab.status, concurrency_id="models",
        api_name=tab.name,
    )  # fmt: skip
    running.then(None, None, None, js=SCROLL_TO_ERROR, **QUIET)
    # Stop also ends a run that waits for its turn.
    tab.buttons[1].click(events.stop, None, [*tab.buttons, tab.status], **QUIET, cancels=[running])
    for changed in tab.inputs:
        changed.change(events.reset, changed, tab.shown, **QUIET)
