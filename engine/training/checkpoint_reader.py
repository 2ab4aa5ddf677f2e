"""Safe reading of checkpoint folders from untrusted sources."""

from __future__ import annotations

import math
import pickle
from pathlib import PosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp_metadata

from engine.errors import UserError
from engine.untrusted import safe_name

# Allowed classes in the pickled `.metadata` of a dict of tensors. BytesStorageMetadata is excluded, as torch would
# unpickle the described data without restrictions.
_NAMED = (
    dcp_metadata.Metadata, dcp_metadata.TensorStorageMetadata, dcp_metadata.TensorProperties,
    dcp_metadata.ChunkStorageMetadata, dcp_metadata.MetadataIndex, dcp_metadata.StorageMeta,
    dcp_metadata._MEM_FORMAT_ENCODING, filesystem._StorageInfo, torch.serialization._get_layout, torch.Size, PosixPath,
)  # fmt: skip
_GLOBALS: dict[tuple[str, str], Any] = {(found.__module__, found.__qualname__): found for found in _NAMED}
_GLOBALS |= {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


def _member(found: type, name: str) -> Any:
    """Replacement of `getattr`, with which Python 3.11.2 (Debian 12) pickles enum members; 3.11.7 does not."""
    if found is not dcp_metadata._MEM_FORMAT_ENCODING or name not in found.__members__:
        raise pickle.UnpicklingError(f"it requests {name!r} of {found}")
    return found[name]


_GLOBALS["builtins", "getattr"] = _member


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return _GLOBALS[module, name]


class Reader(dcp.FileSystemReader):
    """Reader for untrusted checkpoints: no code named in the files is executed, and no file outside of the folder is
    read.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp_metadata.Metadata:
        """Read and validate the metadata of the checkpoint."""
        try:
            with (self.path / ".metadata").open("rb") as file:
                found = _Unpickler(file).load()
            size = 0
            for entry in found.state_dict_metadata.values():
                if not isinstance(entry, dcp_metadata.TensorStorageMetadata):
                    raise ValueError("it contains more than tensors")
                count = math.prod(entry.size)
                if min(entry.size, default=0) < 0 or sum(math.prod(part.sizes) for part in entry.chunks) != count:
                    raise ValueError("the sizes of a tensor and its shards differ")
                size += count * entry.properties.dtype.itemsize
            for place in found.storage_data.values():
                safe_name(place.relative_path, "the name of a data file")
                if place.transform_descriptors:
                    raise ValueError("its data files are compressed")
            if size > sum(path.stat().st_size for path in self.path.glob("*.distcp")):
                raise ValueError(f"its files are too small for {size:,} bytes of tensors")
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise UserError(
                f"checkpoint {self.path} is damaged or forged: .metadata cannot be read ({error})"
            ) from error
        found.storage_meta = dcp_metadata.StorageMeta(load_id=self.load_id)
        return found
