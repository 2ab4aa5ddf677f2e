"""Declarative settings: a dataclass field states name, type, bounds or choices, default and description.

    @dataclass(frozen=True)
    class SamplerConfig(Group, prefix="sampler."):
        steps: int = setting(64, 1, 1000, "sampling steps (the paper: 64)")

Command lines, `--help` and `--cfg` (`engine.config`), requests of the service and lines of job files are derived from
it.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache, partial
from importlib.util import find_spec
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from engine.errors import UserError, require

T = TypeVar("T")
NamedJob = tuple[str, Any | UserError]  # a job of infer.py; one that could not be read is the error with which it fails
hints_of = lru_cache(get_type_hints)  # type of each field of a dataclass
NEEDED = dataclasses.MISSING  # default of a mandatory setting
DEVICES = ("auto", "cpu", "cuda", "mps")
EXECUTORS = ("processes", "ray")
PRECISIONS = ("auto", "fp32", "bf16", "int8")
WORD_FILES = (".json", ".srt", ".vtt")  # file suffixes written by timestamps=true
SEEDS = (0, 2**63 - 1)  # range of valid seeds for torch
# descriptions of settings that both models share
SEED = "random seed; equal seeds give equal results on the same machine"
WHICH_FACE = (
    "which of several faces: largest, central, left, right, speaking (whose mouth moves most), or 1, 2, ... by size"
)
FACE_BOX = "position of the face, instead of detection: x,y,w,h in pixels, or a JSON file of boxes"
KINDS = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list, as in [1,2]",
    dict: "a group of settings: set its members",
}  # fmt: skip


def setting(
    default: Any, low: float | None = None, high: float | None = None, about: str = "", *, choices: Collection[str] = ()
) -> Any:
    """Declare a setting: a dataclass field with a default, bounds (for a list, those of its items) or choices, and a
    description.
    """
    metadata = {"bounds": None if low is None else (low, high), "choices": tuple(choices), "about": about}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=partial(copy.deepcopy, default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Group:
    """Base class of settings dataclasses. Types, bounds and choices are checked on construction. `prefix` is the dotted
    path in errors.
    """

    prefix: ClassVar[str]

    def __init_subclass__(cls, prefix: str = "") -> None:
        cls.prefix = prefix

    def __post_init__(self) -> None:
        hints = hints_of(type(self))
        for field in dataclasses.fields(self):
            name = field.name
            value = getattr(self, field.name)
            hint = hints[field.name]
            check_value(f"{self.prefix}{name}", value, hint, field.metadata)
            if get_origin(hint) is tuple:  # YAML and JSON yield lists
                object.__setattr__(self, name, tuple(value))
            elif isinstance(value, Real) and not isinstance(value, bool | int | float):  # NumPy's
                object.__setattr__(self, name, value.item())


def group(kind: type, unset: bool = False, about: str = "") -> Any:
    """Declare a nested group of settings, which the dataclass `kind` defines.

    If `unset`, it is a dict of overrides of settings that are stored elsewhere; each is None (no change) by default.
    """
    factory = partial(dict.fromkeys, [field.name for field in dataclasses.fields(kind)]) if unset else kind
    return dataclasses.field(default_factory=factory, metadata={"group": kind, "unset": unset, "about": about})


def make(schema: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Create the dataclass from these values. Values of nested groups are mappings or dataclasses."""
    made = dict(values)
    for name, field in _fields(schema, values, prefix).items():
        if "group" in field.metadata and isinstance(value := values.get(name), Mapping):
            kind = field.metadata["group"]
            if field.metadata["unset"]:
                override(kind(), value)  # only validated: the values stay a dict of overrides
            else:
                made[name] = make(kind, value, f"{prefix}{name}.")
    return schema(**made)


def override(settings: T, changes: Mapping[str, Any]) -> T:
    """Return a copy of `settings` in which the fields in `changes` are replaced, except where the new value is None."""
    _fields(type(settings), changes, settings.prefix)
    return dataclasses.replace(settings, **{name: value for name, value in changes.items() if value is not None})


def with_arguments(settings: T, arguments: Mapping[str, Any], others: Collection[str] = ()) -> T:
    """Return a copy of `settings` changed by the keyword arguments of a method. Errors state only the argument names.

    Args:
        others: names of the other arguments of the method.

    Raises:
        UserError: If an argument is unknown, or its value is not allowed.
    """
    names = [field.name for field in dataclasses.fields(settings)]
    for name in arguments:
        if name not in names:
            raise UserError(f"unknown argument {name[:80]!r}; {nearest(name, [*names, *others])}")
    try:
        return dataclasses.replace(settings, **arguments)
    except UserError as error:
        raise UserError(str(error).removeprefix(settings.prefix)) from error


def check_value(name: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> None:
    """Check that `value` has the type `hint` and satisfies the bounds or choices in the metadata of a `setting`."""
    kind, takes_none = kind_of(hint)
    if value is None and (takes_none or kind is None):
        return
    bounds = metadata.get("bounds")
    choices = metadata.get("choices")
    if kind is list and not is_a(value, list):
        raise UserError(f"{name}={str(value)[:40]} must be {KINDS[list]}")
    for item in value if kind is list else [value]:
        if choices:
            require_choice(name, item, choices)
        elif bounds:
            whole = int in (hint, *get_args(hint))
            require_range(name, item, *(bounds if whole else map(float, bounds)))
        elif kind not in (None, list) and not is_a(item, kind):
            raise UserError(f"{name}={str(item)[:40]} must be {KINDS[kind]}")


def require_range(name: str, value: Any, low: float, high: float) -> None:
    """Check that `value` is a number from `low` to `high`, and an integer if both bounds are."""
    kind = int if isinstance(low, int) and isinstance(high, int) else float
    if not is_a(value, kind) or not low <= value <= high:
        raise UserError(f"{name}={str(value)[:40]} must be {KINDS[kind]} from {low:,} to {high:,}")


def check_seed(seed: Any) -> None:
    """Raise UserError if `seed` is not a valid seed for torch."""
    require_range("seed", seed, *SEEDS)


def require_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Check that `value` is one of the choices."""
    if value not in choices:
        raise UserError(f"{name}={str(value)[:40]} is unknown; choose {', '.join(choices)}")


def is_a(value: Any, kind: type) -> bool:
    """Return whether a value is of the type `kind`, one of `KINDS`. A bool does not count as a number."""
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if kind is list:  # Hydra passes its own sequence types
        return isinstance(value, Sequence) and not isinstance(value, str)
    return isinstance(value, Mapping if kind is dict else kind)


def kind_of(hint: Any) -> tuple[Any, bool]:
    """Return the member of `KINDS` for a field's type (or None), and whether the field accepts None."""
    options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    kind = next(option for option in options if option is not NoneType)
    kind = get_origin(kind) or kind
    if isinstance(kind, type) and kind not in KINDS:
        kind = dict if issubclass(kind, Mapping) else list if issubclass(kind, Sequence) else None
    return kind if kind in KINDS and len(options) - (NoneType in options) == 1 else None, NoneType in options


def nearest(wrong: str, names: Collection[str]) -> str:
    """Return a phrase with the names most similar to `wrong`. For dotted keys, names with a similar last component are
    considered.
    """

    wrong = wrong[:80]  # comparing longer words takes seconds

    def likeness(name: str, parts: slice = slice(None)) -> float:
        words = (".".join(key.split(".")[parts]) for key in (wrong, name))
        return difflib.SequenceMatcher(None, *words).ratio()

    initials = "".join(part[:1] for part in wrong.split(".")[-1].split("_"))  # learning_rate: lr
    last = slice(-1, None)
    close = [name for name in dict.fromkeys(names) if likeness(name) >= 0.6 or likeness(name, last) >= 0.7]
    close.sort(key=likeness, reverse=True)
    abbreviated = [name for name in names if len(initials) > 1 and name.split(".")[-1] == initials]
    if close or abbreviated:
        return f"did you mean {' or '.join(dict.fromkeys([*abbreviated, *close][:3]))}?"
    return f"available: {', '.join(sorted(names)[:12])}" if names else "none is available"


def _fields(schema: type, values: Mapping[str, Any], prefix: str) -> dict[str, dataclasses.Field]:
    fields = {field.name: field for field in dataclasses.fields(schema)}
    for name in values:
        if name not in fields:
            raise UserError(f"unknown setting {prefix + str(name)[:80]!r}; {nearest(str(name), list(fields))}")
    return fields


@dataclasses.dataclass
class Limits(Group, prefix="limits."):
    """Limits for input files. Larger files are rejected before they are decoded."""

    pixels: int = setting(2**24, 2**8, 2**31, "maximum pixels per video frame (4K: 8,294,400)")
    picture_pixels: int = setting(2**26, 2**8, 2**31, "maximum pixels per image")
    seconds: float = setting(3600.0, 0.1, 1e6, "maximum length of a video or audio file in seconds")
    gap: float = setting(
        60.0, 0.1, 1e6, "maximum seconds between two frames of a video; larger gaps are damaged time stamps"
    )


# Limits of this process. They bound what its decoders may take, as `resource.setrlimit` bounds a process: a parameter
# would have to pass through every pipeline, metric, data set and preparation stage that reads a file.
LIMITS = Limits()


def set_limits(limits: Limits) -> None:
    """Set the limits of this process."""
    vars(LIMITS).update(vars(limits))


@dataclasses.dataclass(frozen=True)
class ClusterConfig(Group, prefix="ray."):
    """Settings `ray` of commands with executor=ray."""

    address: str | None = setting(
        None, about="auto (the cluster of this machine) or HOST:PORT; null: start a local cluster"
    )
    workers: int = setting(1, 1, 4096, "number of workers, with one CPU each")
    gpus: float = setting(0.0, 0.0, 8.0, "GPUs per worker: 1, a fraction such as 0.25 to share a GPU, or 0")


def check_place(executor: str, devices: str = "1", device: str = "cpu", gpus: float = 0.0) -> None:
    """Check that Ray is installed if needed, and that `devices` is a number or "all" and not combined with `ray`.

    A Ray worker without an assigned GPU must not use one, as all workers of a machine would then use the first GPU.
    """
    if devices != "all" and not (devices.isdecimal() and len(devices) < 3 and 1 <= int(devices) <= 64):
        raise UserError(f"devices={devices} must be a number from 1 to 64, or all")
    if executor == "ray" and devices != "1":
        raise UserError(f"devices={devices} with executor=ray: set ray.workers and ray.gpus instead")
    if executor == "ray" and device != "cpu" and not gpus:
        raise UserError(f"ray.gpus=0 with device={device}: set ray.gpus=1 (0.5: two workers share one), or device=cpu")
    if executor == "ray" and find_spec("ray") is None:
        raise UserError("executor=ray requires Ray: bash scripts/setup.sh cluster")


@dataclasses.dataclass(frozen=True)
class RunConfig(Group):
    """Settings of `infer.py` that all models share: devices, precision and output."""

    unit: ClassVar[str] = "jobs"  # what a job is called in messages

    output: str = setting("outputs", about="output folder")
    device: str = setting("auto", choices=DEVICES, about="auto, cpu, cuda or mps")
    devices: str = setting("1", about="number of devices, with one process each; all: every device of this machine")
    executor: str = setting(
        "processes", choices=EXECUTORS, about="where batches run: processes (of this machine), or ray (extra `cluster`)"
    )
    ray: ClusterConfig = group(ClusterConfig, about="with executor=ray")
    precision: str = setting(
        "auto",
        choices=PRECISIONS,
        about="fp32, bf16, or auto: bf16 on devices with native support (CUDA, AVX-512 BF16, AMX); "
        "int8: transformer blocks in 8 bits (x86 with VNNI; on CUDA weights alone)",
    )
    compile: bool = setting(False, about="torch.compile the sampler's steps; each run first compiles for minutes")
    batch_size: int = setting(8, 1, 1024, "number of clips or jobs per batch")
    figure: bool = setting(True, about="write the figure NAME.png; false keeps an existing one")
    timestamps: bool = setting(
        False,
        about="write word timestamps: NAME.json, .srt and .vtt (for HiCoDiT, of recognised words, often wrong ones); "
        "needs setup.sh eval",
    )
    limits: Limits = group(Limits, about="larger inputs are rejected before they are decoded")

    def __post_init__(self) -> None:
        Group.__post_init__(self)  # skip the job's own validation, which runs per job
        check_place(self.executor, self.devices, self.device, self.ray.gpus)
        if self.timestamps:
            require("pocketsphinx", "pocketsphinx")
