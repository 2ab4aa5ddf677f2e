# The service, or any command of this repository, in a container.
#
#     docker build -t speaking-faces .                                  # runs on a CPU, and on GPUs with --gpus all
#     docker run --rm -p 127.0.0.1:8000:8000 speaking-faces             # the service with the bundled weights
#     docker run --rm -v "$PWD:/data" speaking-faces infer.py input=/data/clip.mp4 output=/data/spoken
#
# BASE: an image with Python 3.11 to 3.13. EXTRAS: as of scripts/setup.sh. PyTorch as PyPI serves it brings CUDA's libraries;
# for a smaller image without them, give the address of PyTorch's CPU wheels as PIP_EXTRA_INDEX_URL.
# A C compiler is there for Triton, which `compile=true` uses. Give loader workers and NCCL the memory of the host with
# `docker run --ipc=host` (or --shm-size=16g): /dev/shm has 64 MB otherwise, and workers die with a bus error.
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}
ARG EXTRAS=serve
ARG PIP_EXTRA_INDEX_URL=
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 HOME=/home/app
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 10001 app && mkdir /app /weights /voices /data && chown app /app /weights /voices /data
USER 10001
WORKDIR /app
COPY --chown=app . .
RUN PYTHON="$(command -v python3)" bash scripts/setup.sh ${EXTRAS}
VOLUME ["/weights", "/voices", "/data"]
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD \
    [".venv/bin/python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT [".venv/bin/python"]
CMD ["scripts/serve.py", "--host", "0.0.0.0", "--voices", "/voices"]
