"""Serve the models to other programs: `python scripts/serve.py` (needs the extra `serve`).

/v1/...            OpenAI's interface: models, audio/speech, videos; see docs/service.md
WS /hicodit/stream {"lookahead": 0.4}, JPEG or PNG frames at 25 per second, a text message -> audio in hops of 160 ms
GET /health, GET /docs

Requests of several clients share batches; those of Talker-T2AV join and leave a running batch. Requests beyond the
limits receive status 429, invalid ones 400 with a message {"error": "..."}. Only this machine can connect unless --host
allows others. There is no authentication or encryption, so use a reverse proxy.
"""

from __future__ import annotations

if __name__ == "__main__":
    import environment  # noqa: F401 -- before anything that may be missing

from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from engine.arguments import Parser, check_port, within
from engine.device import pick_device
from engine.errors import UserError, require, run_cli
from engine.settings import DEVICES, PRECISIONS, Limits, set_limits
from service.limits import ServeLimits


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        choices=("hicodit", "talker_t2av"),
        default=["hicodit", "talker_t2av"],
        help="models to serve",
    )
    add("--weights", help="HiCoDiT's release folder (default: of the bundled ones, that for the face of each clip)")
    add("--talker", help="Talker-T2AV's release folder (default: the bundled one)")
    add("--voices", type=Path, help="folder of recordings of voices: NAME.wav is voice=NAME")
    add("--device", choices=DEVICES, default="auto", help="where the models run")
    add("--precision", choices=PRECISIONS, default="auto", help="precision of the models' matrices")
    add("--sampler", choices=("release", "fast", "paper"), default="fast", help="settings of HiCoDiT's sampler")
    add("--sampling", choices=("release", "fast"), default="release", help="settings of Talker-T2AV's diffusion heads")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=within(1, 65_535), default=8000, help="port to listen on")
    add("--strict_names", action="store_true", help="refuse OpenAI's names of models (tts-1) and voices (alloy)")
    for limit in fields(ServeLimits):
        add(f"--{limit.name}", type=type(limit.default), default=limit.default, help=limit.metadata["about"])
    args = parser.parse_args()
    limits = ServeLimits(**{limit.name: getattr(args, limit.name) for limit in fields(ServeLimits)})
    check_port(args.host, args.port)
    if args.voices is not None and not args.voices.is_dir():
        raise UserError(f"--voices {args.voices} is not a folder: create it, or omit the option")
    for package in ("fastapi", "uvicorn", "websockets", "python_multipart"):
        require(package, package, "serve")
    from hicodit.bundled import PipelineChooser
    from hicodit.pipeline import HiCoDiTPipeline
    from hicodit.settings import with_preset
    from service.server import Server
    from service.service import Service
    from talker_t2av.pipeline import TalkerPipeline
    from talker_t2av.settings import with_preset as with_sampling
    from talker_t2av.system import BUNDLED as BUNDLED_TALKER

    set_limits(Limits(seconds=limits.seconds))
    device = pick_device(args.device)
    hicodit = talker = None

    def load_hicodit(weights: str | Path) -> HiCoDiTPipeline:
        pipeline = HiCoDiTPipeline.from_pretrained(weights, device, precision=args.precision)
        pipeline.sampler, pipeline.guidance = with_preset(args.sampler, pipeline.sampler, pipeline.guidance)
        return pipeline

    if "hicodit" in args.models:
        hicodit = PipelineChooser(load_hicodit, args.weights)
        hicodit.load_all()
    if "talker_t2av" in args.models:
        talker = TalkerPipeline.from_pretrained(args.talker or BUNDLED_TALKER, device, precision=args.precision)
        talker.sampling = with_sampling(args.sampling, talker.sampling)
    service = Service(hicodit, talker, limits, args.talker is None, args.voices, aliases=not args.strict_names)
    print(f"serving {', '.join(service.workers)} on http://{args.host}:{args.port}; Ctrl-C ends", flush=True)
    with suppress(KeyboardInterrupt):
        Server(service, args.host, args.port).run()


if __name__ == "__main__":
    run_cli(main)
