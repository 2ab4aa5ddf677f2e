"""Settings of `scripts/evaluate.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.settings import (
    DEVICES,
    EXECUTORS,
    NEEDED,
    PRECISIONS,
    SEEDS,
    ClusterConfig,
    Group,
    Limits,
    check_place,
    group,
    setting,
)


@dataclass(frozen=True)
class GenerateConfig(Group, prefix="generate."):
    """Settings of systems that generate outputs. A model has those that are parameters of its function in
    `engine.evaluation.systems`; the others must have their defaults.
    """

    weights: str | None = setting(None, about="release folder of the model; null: the bundled one")
    codec: str | None = setting(
        None, about="hicodit: release folder of the tokenizer; null: the tokenizer of the weights"
    )
    codecs: dict[str, Any] = setting(
        {}, about="talker_t2av: release folders of codecs, which override those of the weights, as in {speech: FOLDER}"
    )
    detector: str | None = setting(
        None,
        about="hicodit: what finds faces: cascade, mtcnn, or the path of YuNet's file; null: as in the training of the "
        "weights",
    )
    face_landmarks: str | None = setting(
        None,
        about="hicodit: landmarks in every frame: dlib68, mtcnn, yunet, or a file or folder; null: as in training",
    )
    precision: str = setting("fp32", choices=PRECISIONS, about="precision of the model: fp32, bf16, int8 or auto")
    sampler: str = setting("release", about="hicodit: release, paper or fast (configs/sampler)")
    sampling: dict[str, Any] = setting({}, about="settings that override those of the sampler, as in {steps:5}")
    guidance: dict[str, Any] = setting(
        {}, about="hicodit: guidance scales that override those of the sampler, as in {all:2.25}"
    )
    voice: bool = setting(
        False,
        about="hicodit: true: the voice of another clip of the speaker, or of reference_audio in the manifest; false: "
        "the face's",
    )
    expressions: str = setting(
        "own", about="hicodit: own, shuffled (those of another clip) or exchanged (the first and the last of the clip)"
    )
    mode: str = setting("t2av", about="talker_t2av: t2av, tts, a2v, v2a, or resynthesis (the codecs alone)")
    driving: str | None = setting(
        None,
        about="talker_t2av, a2v: folder of ID.wav that faces move to, as outputs of t2av; null: the ground truth",
    )
    compat: str = setting(
        "paper",
        about="talker_t2av, t2av and tts: paper, official (as the released command line) or library (as its methods)",
    )
    prefix_seconds: float = setting(
        0.0, 0.0, 30.0, "talker_t2av: seconds of the reference that are continued; the released command line: 0.5"
    )
    one_pass: bool = setting(
        False, about="talker_t2av: long texts at once, up to 30 s, as in the paper; false: in parts"
    )
    levels: int | None = setting(None, 1, 64, "rvq_codec: number of levels to decode; null: all")
    seed: int = setting(0, *SEEDS, "clip i is generated with seed + i")
    batch_size: int = setting(8, 1, 1024, "number of clips generated at once")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Group):
    """Settings of `scripts/evaluate.py`; a table (configs/table) sets several of them."""

    outputs: Any = setting(
        None, about="folder of a system's files ID.wav or ID.mp4; several: {name: folder, other: folder}"
    )
    references: str | None = setting(
        None, about="folder of the ground-truth files ID.wav or ID.mp4, or of both; null: the manifest names them"
    )
    manifest: str | None = setting(
        None,
        about="JSONL, a clip per line: id, text, output, reference, video, speaker, language, heard; null: all of "
        "references=, texts from ID.txt",
    )
    output: str = setting(NEEDED, about="folder of the report: report.html, results.json, the cache")
    corpus: str | None = setting(None, about="folder of a synthetic corpus, in place of references= and manifest=")
    split: list[str] = setting([], about="its splits, as in [seen]; several have a report each, in OUTPUT/SPLIT")
    clips: int | None = setting(None, 1, 10**7, "number of clips, evenly spread over the manifest; null: all")
    columns: list[str] = setting(NEEDED, about="metrics of the table, in the order of its columns")
    metrics: Any = setting(None, about="the metrics to measure, such as [wer,stoi]; null: those of the table")
    downloads: str = setting("checkpoints", about="folder of the metrics' networks (download_checkpoints.py metrics)")
    video: str = setting(
        "source",
        choices=("source", "output"),
        about="video of outputs without frames: source (the input video), or output (none)",
    )
    protocol: dict[str, Any] = setting(
        {}, about="protocol by metric, as in {wer: grammar}; default: the first protocol of the metric"
    )
    grammar: str | None = setting(
        None, about="JSGF grammar file for protocol.wer=grammar; null: the grammar of corpus="
    )
    voices: dict[str, Any] = setting(
        {}, about="by split: prepared shards with the voices for speaker identification; default: those of the clips"
    )
    aim: dict[str, Any] = setting({}, about="target values by split")
    paper_tables: dict[str, Any] = setting(
        {}, about="tables of the paper by title, {columns: [...], rows: {system: [...]}}; shown below the results"
    )
    device: str = setting("auto", choices=DEVICES, about="auto, cpu, cuda or mps")
    devices: str = setting(
        "1",
        about="number of devices that generate outputs, each with a separate process; all: those of this machine",
    )
    executor: str = setting(
        "processes",
        choices=EXECUTORS,
        about="executor: processes (on this machine), or ray (a cluster, extra `cluster`)",
    )
    ray: ClusterConfig = group(ClusterConfig, about="with executor=ray")
    workers: int | None = setting(None, 1, 10**7, "number of measurement processes; null: one per core")
    cache: str | None = setting(
        None, about="cache folder for measurements, which reports can share; null: OUTPUT/cache"
    )
    exchanged: bool = setting(
        False, about="add a control to each system: its outputs, each measured as if it were another clip's"
    )
    compare: bool = setting(True, about="test for significant differences between systems")
    resamples: int = setting(2000, 1, 10**7, "number of resamples of the bootstrap and of the permutation test")
    media: bool = setting(True, about="include players and spectrograms of the best and worst clips in the report")
    title: str | None = setting(None, about="title of the report; null: the name of the table")
    record: str | None = setting(
        None, about="FOLDER/NAME of a JSON record FOLDER/DATE-NAME.json of the results, without those of single clips"
    )
    model: str | None = setting(
        None, about="hicodit, talker_t2av, rvq_codec, whisperx_vae or lia_x: generate outputs first"
    )
    systems: dict[str, Any] = setting(
        {}, about="systems to generate by name: `model`, and settings of generate that differ"
    )
    only: list[str] | None = setting(None, about="names of the systems to generate; null: all")
    generate: GenerateConfig = group(GenerateConfig, about="seed of the systems of model=")
    limits: Limits = group(Limits, about="larger inputs are rejected before they are decoded")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_place(self.executor, self.devices, self.device, self.ray.gpus)
