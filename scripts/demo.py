"""Try the models in a browser on this machine: `python scripts/demo.py` (needs the demo extra).

One tab generates speech for a silent clip, the other a talking face from a text. The fields start with bundled
examples. Only this machine can open the page, unless --host allows others; no data is sent to other servers. Uploads
and results are deleted when the program ends.
"""

from __future__ import annotations

if __name__ == "__main__":
    import environment  # noqa: F401 -- before anything that may be missing

import os
import tempfile
from pathlib import Path

from engine.arguments import Parser, check_port, within
from engine.errors import require, run_cli
from engine.settings import DEVICES, Limits, set_limits
from service.demo_actions import MAX_SECONDS, Demo
from talker_t2av.system import BUNDLED as BUNDLED_TALKER


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--weights", help="release folder of HiCoDiT (default: the bundled release for the face in each clip)")
    add("--talker", default=BUNDLED_TALKER, help="release folder of Talker-T2AV (default: the bundled one)")
    add("--device", choices=DEVICES, default="auto", help="device of the models")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=within(1, 65_535), default=7860, help="port to listen on")
    args = parser.parse_args()
    check_port(args.host, args.port)
    set_limits(Limits(seconds=MAX_SECONDS))
    with tempfile.TemporaryDirectory(prefix="speaking-faces-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read when gradio is imported
        require("gradio", "gradio", "demo")
        from service.demo_page import CSS, SCRIPT, page

        print("loading the models", flush=True)
        blocks = page(Demo(Path(folder), args.weights, args.talker, args.device))
        blocks.launch(
            server_name=args.host,
            server_port=args.port,
            share=False,
            show_error=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size="500mb",
            run_history=False,
            footer_links=[],
            css=CSS,
            js=SCRIPT,
        )
        print(f"open http://{args.host}:{args.port} in a browser; Ctrl-C ends", flush=True)
        blocks.block_thread()


if __name__ == "__main__":
    run_cli(main)
