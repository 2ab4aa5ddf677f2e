"""The reader of torch files: tensors come out, nothing that the file names is run."""

import pickle
import shutil
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from engine.errors import UserError
from engine.torch_files import StandIn, plain, read_checkpoint


class Bomb:
    """Copies a file if it is unpickled."""

    def __init__(self, source, target):
        self.paths = str(source), str(target)

    def __reduce__(self):
        return shutil.copyfile, self.paths


@pytest.fixture
def bomb(tmp_path):
    (tmp_path / "source").write_text("x")
    return Bomb(tmp_path / "source", tmp_path / "made")


def test_a_checkpoint_runs_no_code(tmp_path, bomb):
    torch.save({"tensor": torch.ones(2), "bomb": bomb}, tmp_path / "a.ckpt")
    content = read_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "made").exists()
    assert isinstance(content["bomb"], StandIn)
    assert torch.equal(content["tensor"], torch.ones(2))
    pickle.loads(pickle.dumps(bomb))  # the bomb is live
    assert (tmp_path / "made").exists()


def test_files_of_the_legacy_format_may_contain_only_tensors(tmp_path, bomb):
    path = tmp_path / "a.ckpt"
    torch.save({"tensor": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(path)["tensor"], torch.ones(2))
    torch.save({"tensor": torch.ones(2), "bomb": bomb}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="damaged, or contains more than tensors"):
        read_checkpoint(path)
    assert not Path(tmp_path / "made").exists()


def test_settings_become_plain_dicts(tmp_path):
    tree = {"a": {"b": [1, 2.5, "x"], "c": True}, "d": None}
    content = {"node": OmegaConf.create(tree), "args": Namespace(heads=4, inner=Namespace(norm=True))}
    content["meters"] = defaultdict(list, train=[1])
    torch.save(content, tmp_path / "a.ckpt")
    read = read_checkpoint(tmp_path / "a.ckpt")
    assert plain(read["node"]) == tree
    assert plain(read["args"]) == {"heads": 4, "inner": {"norm": True}}
    assert dict(read["meters"]) == {"train": [1]}
