"""A step of one rank of 32, without cards: what it holds and sends, and an error in one line."""

import pytest

from benchmarks import dry_run
from engine.errors import UserError

SMALL = ["trainer=fsdp", "task.model.low_blocks=1", "task.model.high_blocks=1"]


def test_a_rank_holds_its_shards_and_gathers_blocks_in_half_precision():
    found = dry_run.dry_run("hicodit_paper", SMALL, 32)
    assert found["batch"] == "32 x 1 x 1"
    memory, calls = found["memory"], found["collectives"]
    assert memory["optimiser"] == pytest.approx(2 * memory["weights"], rel=0.01)
    gathered = [(dtype, size) for kind, dtype, size, _ in calls if kind == "all-gather"]
    assert {dtype for dtype, _ in gathered} == {"bfloat16", "float32"}
    largest = max(size for dtype, size in gathered if dtype == "float32")
    assert largest < 32 * memory["weights"]  # what is in no block
    assert found["padding"] > 0.7
    assert "padding efficiency" in dry_run.report(found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dry_run=many"], "dry_run=many must be a number of ranks"),
        (["dry_run=32"], "name a recipe with experiment=NAME"),
        (["dry_run=32", "experiment=hicodit_paper"], "trainer.parallel=ddp: use trainer=fsdp"),
        (["dry_run=33", "experiment=hicodit_paper", "trainer=fsdp"], "cannot be shared by 33 processes"),
    ],
)
def test_mistakes_are_one_line(words, message):
    with pytest.raises(UserError, match=message):
        dry_run.main(words)
