"""Serve the models to other programs: `python scripts/serve.py` (needs the extra `serve`).

/v1/...            OpenAI's interface: models, audio/speech, videos; see docs/service.md
WS /hicodit/stream {"lookahead": 0.4}, then JPEG or PNG pictures, 25 a second, then a text -> sound in hops of 160 ms
GET /health, GET /docs

Requests of several clients share batches; Talker-T2AV's join and leave a running one. What there is no room for is
refused with 429, a wrong request with 400 and one sentence: {"error": "..."}. Only this machine can connect, unless
--host allows others; there are no accounts and no encryption, so put a proxy in front of it.
"""

from __future__ import annotations

if __name__ == "__main__":
    import environment  # noqa: F401 -- before anything that may be missing

from dataclasses import fields
from pathlib import Path

from engine.device import pick_device
from engine.errors import UserError, require, run_cli
from engine.settings import DEVICES, PRECISIONS, Limits, set_limits
from scripts.arguments import Parser, within
from service.limits import MAX_PICTURE, ServeLimits


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=("hicodit", "talker_t2av"), default=["hicodit", "talker_t2av"])
    add("--weights", help="HiCoDiT's release folder (default: the bundled one)")
    add("--talker", help="Talker-T2AV's release folder (default: the bundled one)")
    add("--voices", type=Path, help="folder of recordings, each a voice: NAME.wav is voice=NAME")
    add("--device", choices=DEVICES, default="auto", help="where the models run")
    add("--precision", choices=PRECISIONS, default="auto", help="of the models' matrices")
    add("--sampler", choices=("release", "fast", "paper"), default="fast", help="of HiCoDiT")
    add("--sampling", choices=("release", "fast"), default="release", help="of Talker-T2AV")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=within(1, 65_535), default=8000, help="port to listen on")
    for limit in fields(ServeLimits):
        add(f"--{limit.name}", type=type(limit.default), default=limit.default, help=limit.metadata["about"])
    args = parser.parse_args()
    limits = ServeLimits(**{limit.name: getattr(args, limit.name) for limit in fields(ServeLimits)})
    if args.voices is not None and not args.voices.is_dir():
        raise UserError(f"--voices {args.voices} is no folder: make it, or leave the option out")
    for package in ("fastapi", "uvicorn", "websockets", "python_multipart"):
        require(package, package, "serve")
    import uvicorn

    from hicodit.pipeline import HiCoDiTPipeline
    from hicodit.settings import BUNDLED, with_preset
    from service.app import make_app
    from service.service import Service
    from talker_t2av.pipeline import TalkerPipeline
    from talker_t2av.settings import with_preset as with_sampling
    from talker_t2av.system import BUNDLED as BUNDLED_TALKER

    set_limits(Limits(seconds=limits.seconds))
    device, hicodit, talker = pick_device(args.device), None, None
    if "hicodit" in args.models:
        hicodit = HiCoDiTPipeline.from_pretrained(args.weights or BUNDLED, device, precision=args.precision)
        hicodit.sampler, hicodit.guidance = with_preset(args.sampler, hicodit.sampler, hicodit.guidance)
    if "talker_t2av" in args.models:
        talker = TalkerPipeline.from_pretrained(args.talker or BUNDLED_TALKER, device, precision=args.precision)
        talker.sampling = with_sampling(args.sampling, talker.sampling)
    service = Service(hicodit, talker, limits, demo=args.talker is None, voices=args.voices)
    print(f"serving {', '.join(service.workers)} on http://{args.host}:{args.port}; Ctrl-C ends", flush=True)
    uvicorn.run(
        make_app(service), host=args.host, port=args.port, log_level="warning", ws="websockets-sansio",
        ws_max_size=MAX_PICTURE, timeout_graceful_shutdown=5,
    )  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
