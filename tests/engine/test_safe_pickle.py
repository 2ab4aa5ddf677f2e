"""The checkpoint reader: tensors come out, nothing that the file names is run."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from engine.safe_pickle import StandIn, plain, read_checkpoint


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_that_a_checkpoint_names_is_run(tmp_path, zipped):
    target = str(tmp_path / "made")
    content = {"tensor": torch.ones(2), "bomb": Bomb(target)}
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    content = read_checkpoint(tmp_path / "a.ckpt")
    assert not Path(target).exists()
    assert isinstance(content["bomb"], StandIn)
    assert torch.equal(content["tensor"], torch.ones(2))
    pickle.loads(pickle.dumps(Bomb(target)))  # the bomb is live
    assert Path(target).exists()


def test_omegaconf_nodes_become_plain(tmp_path):
    tree = {"a": {"b": [1, 2.5, "x"], "c": True}, "d": None}
    torch.save({"node": OmegaConf.create(tree)}, tmp_path / "a.ckpt")
    assert plain(read_checkpoint(tmp_path / "a.ckpt")["node"]) == tree
