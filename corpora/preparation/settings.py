"""Settings of `scripts/prepare_data.py`. Settings of sources and stages are arguments of their classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.settings import DEVICES, EXECUTORS, NEEDED, ClusterConfig, Group, Limits, check_place, group, setting


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Group):
    """Settings of `scripts/prepare_data.py`."""

    output: str = setting(
        NEEDED, about="folder of the shards: OUTPUT/SPLIT/000000.tar, ..., index.json, quarantine.jsonl"
    )
    splits: list[str] | None = setting(None, about="splits of the source, as in [train,val]; null: all of them")
    clips_per_shard: int = setting(200, 1, 10**6, "number of source clips per shard")
    limit: int | None = setting(None, 1, 10**9, "number of clips per split, the first ones; null: all")
    reuse: str | None = setting(
        None, about="folder of earlier shards (may be the output), from which results of unchanged stages are copied"
    )
    executor: str = setting(
        "processes",
        choices=EXECUTORS,
        about="runs the stages: processes (of this machine) or ray (extra `cluster`)",
    )
    workers: int = setting(
        1, 0, 4096, "number of processes of executor=processes; 0: run in the main process, without clip_timeout"
    )
    device: str = setting("auto", choices=DEVICES, about="device of the networks: auto, cpu, cuda or mps")
    clip_timeout: float = setting(600.0, 1.0, 1e6, "timeout per clip in seconds")
    patience: int = setting(25, 1, 10**6, "number of consecutive unexpected failures after which the job stops")
    ray: ClusterConfig = group(ClusterConfig, about="with executor=ray")
    limits: Limits = group(Limits, about="larger inputs are rejected before they are decoded")
    downloads: str | None = setting(
        None, about="folder of the released checkpoints, for features=hicodit_paper and similar"
    )
    source: Any = setting(NEEDED)
    stages: Any = setting(NEEDED)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_place(self.executor)
