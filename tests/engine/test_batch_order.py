"""Which items make a batch: every item once an epoch, few blocks at a time, like lengths together, nothing stored."""

import pickle
from collections import Counter

import pytest
import torch
from toy_task import ToySet

from engine.errors import UserError
from engine.shards.reader import Blocks
from engine.training.batches import MicroBatches

N = 203


class Listed(ToySet):
    """Items are their own numbers and what their generator draws; lengths spread over a factor of ten."""

    def __init__(self, blocks=None, size=N):
        super().__init__(size)
        self.lengths = torch.randint(10, 100, (size,), generator=torch.Generator().manual_seed(1))
        self.blocks = blocks
        self.told = []

    def __getitem__(self, index, generator):
        return torch.tensor([index, int(torch.randint(2**31, (), generator=generator))])

    def prefetch(self, spans):
        self.told = spans


def blocks(window=3, streams=1, size=N):
    sizes = [17, 9, 0, 20, 13] * (size // 59) + [size % 59]
    return Blocks(sizes, window, streams)


def items(batches, number):
    return batches[number]["x"][:, 0].tolist()


def epoch_of(batches, streams=1, epochs=1):
    """Items of the first epochs, by stream, from however many batches they take."""
    each = N // streams
    out = []
    for stream in range(streams):
        seen = []
        turn = 0
        while len(seen) < epochs * each:
            seen += items(batches, turn * streams + stream)
            turn += 1
        out.append([seen[e * each : (e + 1) * each] for e in range(epochs)])
    return out


SETTINGS = {"count": {}, "like lengths": {"by_length": True, "step": 16}}


@pytest.mark.parametrize(("where", "streams"), [("anywhere", 1), ("blocks", 1), ("blocks", 3)])
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_item_comes_once_an_epoch(setting, where, streams):
    order = blocks(streams=streams) if where == "blocks" else None
    batches = MicroBatches(Listed(order), 8, 0, **SETTINGS[setting])
    epochs = epoch_of(batches, streams, 2)
    one, two = ([item for stream in epochs for item in stream[epoch]] for epoch in (0, 1))
    for epoch in (one, two):
        counts = Counter(epoch)
        assert max(counts.values()) == 1 and len(counts) == N // streams * streams
    assert one != two
    batches = MicroBatches(Listed(order), 8, 1, **SETTINGS[setting])
    assert epoch_of(batches, streams)[0][0] != one[: N // streams]


@pytest.mark.parametrize("setting", SETTINGS)
def test_any_number_gives_the_same_batch_at_any_time(setting):
    """A resumed run asks for late batches first, in other processes."""
    batches = MicroBatches(Listed(blocks(streams=2)), 8, 0, **SETTINGS[setting])
    forward = [batches[i]["x"] for i in range(120)]
    again = pickle.loads(pickle.dumps(batches))
    for i in (119, 3, 64, 118, 0):
        assert torch.equal(again[i]["x"], forward[i])
    assert len({tuple(map(int, x.flatten())) for x in forward}) == 120


def test_draws_of_an_item_change_from_epoch_to_epoch():
    batches = MicroBatches(Listed(), 8, 0, by_length=True, step=8)
    draws = {}
    for i in range(60):
        for index, draw in batches[i]["x"].tolist():
            draws.setdefault(index, set()).add(draw)
    assert len(draws) == N and min(map(len, draws.values())) >= 2


def test_a_stream_has_few_blocks_in_use(capsys):
    """Until a window of blocks is used up, nothing comes from elsewhere; and the dataset is told of what comes next."""
    order = blocks(window=3, streams=2)
    data = Listed(order)
    batches = MicroBatches(data, 8, 0)
    starts = torch.tensor(order.sizes).cumsum(0)
    for stream in range(2):
        seen = torch.tensor([i for turn in range(12) for i in items(batches, 2 * turn + stream)])
        block = torch.searchsorted(starts, seen, right=True).tolist()
        last = {b: i for i, b in enumerate(block)}
        first = {b: block.index(b) for b in last}
        used = [sum(first[b] <= i <= last[b] for b in last) for i in range(len(block))]
        assert max(used) <= 3 and len(last) > 5
        assert block != sorted(block)
    told = data.told
    number = 23
    have = items(batches, 23)
    assert all(any(a <= i < b for a, b in told) for i in have)  # and of those in use
    ahead = {i for turn in range(12, 14) for i in items(batches, 2 * turn + number % 2)}
    assert any(a <= i < b for a, b in told for i in ahead - set(have))


def test_windows_that_hold_everything_mix_everything():
    batches = MicroBatches(Listed(blocks(window=100)), 8, 0)
    starts = torch.tensor(blocks().sizes).cumsum(0)
    block = torch.searchsorted(starts, torch.tensor(items(batches, 0) + items(batches, 1)), right=True)
    assert len(block.unique()) > 4


@pytest.mark.parametrize("order", [None, blocks(window=4)], ids=["anywhere", "blocks"])
def test_batches_by_length_pad_little(order):
    data = Listed(order)

    def padding(batches, count):
        real = padded = 0
        for i in range(count):
            lengths = data.lengths[items(batches, i)]
            real = real + int(lengths.sum())
            padded = padded + len(lengths) * int(lengths.max())
        return 1 - real / padded

    assert padding(MicroBatches(data, 8, 0), 50) > 0.3
    batches = MicroBatches(data, 8, 0, by_length=True, step=8)
    assert padding(batches, 50) < 0.2
    longest = [int(data.lengths[items(batches, i)].max()) for i in range(10)]
    assert longest != sorted(longest, reverse=True)  # long ones do not come first


class LogNormal(Listed):
    """Clips whose lengths spread as those of speech corpora do, in shards if `streams` are given."""

    def __init__(self, streams=None, size=20_000):
        super().__init__(None if streams is None else Blocks([100] * (size // 100), 40, streams), size)
        draw = torch.randn(size, generator=torch.Generator().manual_seed(2))
        self.lengths = (100 * (0.5 * draw).exp()).round().clamp(max=400)


@pytest.mark.parametrize(("ranks", "least", "streams"), [(8, 0.8, None), (32, 0.7, 8)], ids=["anywhere", "shards"])
def test_ranks_of_a_step_pad_alike(ranks, least, streams):
    """A step takes as long as its longest batch: mean over maximum of the ranks' padded tokens."""
    data = LogNormal(streams)

    def efficiency(batches):
        factors = []
        for step in range(20_000 // (8 * ranks)):
            longest = torch.stack([data.lengths[batches.samples(step * ranks + rank)].max() for rank in range(ranks)])
            factors.append(float(longest.mean() / longest.max()))
        return sum(factors) / len(factors)

    assert efficiency(MicroBatches(data, 8, 0)) < 0.75
    assert efficiency(MicroBatches(data, 8, 0, by_length=True)) > least
    assert efficiency(MicroBatches(data, 8, 0, by_length=True, step=8 * ranks)) > least


@pytest.mark.parametrize("streams", [None, 8], ids=["anywhere", "shards"])
def test_another_world_size_repeats_no_sample(streams):
    """Of an epoch that 8 ranks began, 16 ranks with half the batch read the rest."""
    data = LogNormal(streams, 4000)
    eight = MicroBatches(data, 8, 0, by_length=True, step=64)
    begun = [sample for number in range(480) for sample in eight.samples(number)]  # 96 %
    sixteen = MicroBatches(data, 4, 0, by_length=True, step=64)
    number = sixteen.resume(eight.state(480))
    rest = [sample for k in range(40) for sample in sixteen.samples(number + k)]
    assert len({*begun}) == 3840 and len({*rest}) == 160
    assert {*begun}.isdisjoint(rest)


def test_settings_that_cannot_work_are_one_line():
    with pytest.raises(UserError, match="ToySet has no lengths of its items"):
        MicroBatches(ToySet(), 8, 0, by_length=True)
    with pytest.raises(UserError, match="streams=6, but there are only 5 clips"):
        MicroBatches(Listed(Blocks([5], 1, 6), size=5), 8, 0)
