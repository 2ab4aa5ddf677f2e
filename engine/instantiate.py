"""Objects from configuration: `_target_` names the class or function, and the other keys of the node are its
arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

from omegaconf import OmegaConf

from engine.errors import UserError

PACKAGES = ("engine", "corpora", "hicodit", "talker_t2av", "rvq_codec", "whisperx_vae", "lia_x", "tests")


def build(node: Any, **extra: Any) -> Any:
    """Call the `_target_` of a node with its other keys as plain Python values.

    Nested nodes with a `_target_` are built first. In contrast to `hydra.utils.instantiate`, only classes and functions
    of this repository are called.

    Args:
        extra: additional arguments, which override those of the node.

    Raises:
        UserError: If the class does not exist, or its signature does not accept the arguments.
    """
    node = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    if isinstance(node, list):
        return [build(part) for part in node]
    if not isinstance(node, dict):
        return node
    arguments = {name: build(part) for name, part in node.items() if name != "_target_"} | extra
    if "_target_" not in node:
        return arguments
    call = target(node["_target_"])
    try:
        inspect.signature(call).bind(**arguments)
    except TypeError as error:  # only for the call itself: a TypeError raised inside is a bug and keeps its traceback
        raise UserError(f"{node['_target_']}: {error}") from error
    return call(**arguments)


def target(name: Any) -> Callable[..., Any]:
    """Return the class or function that a dotted name refers to.

    Only names defined by a module of this repository are accepted, so that a configuration cannot call `os.system` or
    `engine.release.torch.load`.

    Raises:
        UserError: If there is no such class or function.
    """
    module, _, attribute = str(name).rpartition(".")
    member = None
    if module.partition(".")[0] in PACKAGES:
        try:
            member = getattr(import_module(module), attribute, None)
        except ModuleNotFoundError as error:
            if not module.startswith(error.name):  # a package that the module needs is not installed
                raise
    if not callable(member) or (member.__module__, getattr(member, "__qualname__", "")) != (module, attribute):
        raise UserError(f"_target_={name} is not a class or function of {', '.join(PACKAGES[:-1])}")
    return member


def check_targets(node: Any) -> None:
    """Check every `_target_` in nested dicts and lists before any of them is built."""
    if isinstance(node, dict):
        if "_target_" in node:
            target(node["_target_"])
        children = node.values()
    else:
        children = node if isinstance(node, list) else ()
    for child in children:
        check_targets(child)
