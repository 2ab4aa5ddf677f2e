"""HTML report of an evaluation: a single file with embedded audio, video and images that needs no network."""

from __future__ import annotations

import base64
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import jinja2

from engine.errors import UserError
from engine.evaluation.clips import TRUTH, Clip
from engine.evaluation.paper_tables import PaperTable
from engine.evaluation.summary import comparison_lines
from engine.files import write_text
from engine.media.audio import read_audio
from engine.media.ffmpeg import command, source
from engine.media.pictures import spectrogram
from engine.metrics.metric import Take

TEMPLATE = Path(__file__).with_name("report.html.jinja")
SHOWN = 10  # number of best and of worst clips to show
SECONDS = 20.0  # seconds of a clip that are shown
VIDEO_SIDE = 224
RATE = 16_000


def write_report(path: Path, summary: Mapping[str, Any], clips: Sequence[Clip], media: bool = True) -> None:
    """Write the table, the comparison of systems, and the ten best and ten worst clips of the first system.

    If `media` is true, clips have players and spectrograms.
    """
    systems = [name for name in summary["systems"] if name != TRUTH]
    ranking, best, worst = rank(summary, systems)
    by_id = {clip.id: clip for clip in clips}
    cards = {
        title: [_card(by_id[name], summary, systems, media) for name in names]
        for title, names in (("best", best), ("worst", worst))
    }
    strict = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    strict.filters["figure"] = lambda value, digits: f"{value:.{digits}f}".replace("-", "−")
    papers = [PaperTable(**table) for table in summary["paper_tables"]]
    content = {"systems": systems, "comparison": comparison_lines(summary), "cards": cards, "ranking": ranking}
    content |= {"papers": papers}
    write_text(path, strict.from_string(TEMPLATE.read_text()).render(s=summary, **content))


def rank(summary: Mapping[str, Any], systems: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """Return (title, best clips, worst clips) of the first system, ranked by the first figure that has values for
    single clips.

    Ties are broken by the further figures.
    """
    cells = summary["systems"][systems[0]] if systems else {}
    keys = [f for f, about in summary["figures"].items() if f in cells and cells[f]["values"] and about["better"]]
    if not keys:
        return "", [], []
    better = {key: summary["figures"][key]["better"] for key in keys}

    def goodness(clip: str) -> tuple[float, ...]:
        return tuple(better[k] * cells[k]["values"].get(clip, 0.0) for k in keys)

    order = sorted(cells[keys[0]]["values"], key=goodness, reverse=True)
    count = min(SHOWN, (len(order) + 1) // 2)
    return summary["figures"][keys[0]]["title"], order[:count], order[count:][::-1][:SHOWN]


def _card(clip: Clip, summary: Mapping[str, Any], systems: Sequence[str], media: bool) -> dict[str, Any]:
    takes = []
    for name in [*systems, TRUTH]:
        take = clip.truth if name == TRUTH else clip.takes.get(name)
        cells = summary["systems"].get(name, {})
        values = [
            f"{about['title']} {cells[figure]['values'][clip.id]:.{about['digits']}f}"
            for figure, about in summary["figures"].items()
            if clip.id in cells.get(figure, {}).get("values", {})
        ]
        heard = summary["heard"].get(name, {}).get(clip.id)
        takes.append({"name": name, "values": values, "heard": heard, "media": _media(take) if media else ""})
    return {"id": clip.id, "text": clip.truth.text, "speaker": clip.speaker, "takes": takes}


def _media(take: Take | None) -> str:
    """Return a player and a spectrogram of the first 20 s, or "" if the file cannot be shown."""
    if take is None or take.audio is None:
        return ""
    try:
        wave = read_audio(take.audio, RATE)[: int(SECONDS * RATE)]
        shown = _player(take.audio, take.video)
    except UserError:
        return ""
    picture = cv2.resize(spectrogram(wave, RATE), (480, 120), interpolation=cv2.INTER_AREA)
    _, content = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])
    return f'{shown}<img alt="spectrogram" src="{_url(content.tobytes(), "image/jpeg")}">'


def _url(content: Path | bytes, kind: str) -> str:
    content = content.read_bytes() if isinstance(content, Path) else content
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _player(audio: Path, video: Path | None) -> str:
    """Return an <audio> or <video> element, or "" if ffmpeg cannot convert the files."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "clip.mp4"
        files = [*source(audio), *(source(video) if video else [])]
        sound = f"-t {SECONDS} -map 0:a:0 -ac 1 -c:a aac -b:a 48k -movflags +faststart".split()
        picture = f"-map 1:v:0 -vf scale=-2:{VIDEO_SIDE} -c:v libx264 -crf 28 -pix_fmt yuv420p".split()
        options = [*sound, *(picture if video else [])]
        done = subprocess.run(command("-v", "error", *files, *options, str(out)), capture_output=True)
        if done.returncode or not out.is_file():
            return ""
        if video:
            return f'<video controls preload="metadata" playsinline src="{_url(out, "video/mp4")}"></video>'
        return f'<audio controls preload="metadata" src="{_url(out, "audio/mp4")}"></audio>'
