"""The order of samples: each once per epoch, from few shards at a time, batched by length, and reproducible."""

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
        self.prefetched = []

    def load(self, index, generator):
        return torch.tensor([index, int(torch.randint(2**31, (), generator=generator))])

    def prefetch(self, spans):
        assert all(first < last for first, last in spans)  # an empty block has nothing to fetch
        self.prefetched = spans


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
def test_every_sample_occurs_once_per_epoch(setting, where, streams):
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
def test_batches_depend_on_their_number_alone(setting):
    """A resumed run asks for late batches first, in other processes."""
    batches = MicroBatches(Listed(blocks(streams=2)), 8, 0, **SETTINGS[setting])
    forward = [batches[i]["x"] for i in range(120)]
    again = pickle.loads(pickle.dumps(batches))
    for i in (119, 3, 64, 118, 0):
        assert torch.equal(again[i]["x"], forward[i])
    assert len({tuple(map(int, x.flatten())) for x in forward}) == 120


def test_a_stream_reads_few_blocks_at_a_time_and_prefetches_the_next():
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
    now = items(batches, 23)
    assert all(any(a <= i < b for a, b in data.prefetched) for i in now)
    later = {i for turn in range(12, 14) for i in items(MicroBatches(Listed(order), 8, 0), 2 * turn + 1)}
    assert any(a <= i < b for a, b in data.prefetched for i in later - set(now))


class LogNormal(Listed):
    """Clips whose lengths spread as those of speech corpora do, in shards if `streams` are given."""

    def __init__(self, streams=None, size=20_000):
        super().__init__(None if streams is None else Blocks([100] * (size // 100), 40, streams), size)
        draw = torch.randn(size, generator=torch.Generator().manual_seed(2))
        self.lengths = (100 * (0.5 * draw).exp()).round().clamp(max=400)


@pytest.mark.parametrize(("ranks", "least", "streams"), [(8, 0.8, None), (32, 0.7, 8)], ids=["anywhere", "shards"])
def test_ranks_of_a_step_have_similar_lengths(ranks, least, streams):
    """A step takes as long as its longest batch: efficiency is mean over maximum of the padded lengths of the ranks."""
    data = LogNormal(streams)

    def efficiency(batches):
        factors = []
        for step in range(20_000 // (8 * ranks)):
            longest = torch.stack([data.lengths[batches.samples(step * ranks + rank)].max() for rank in range(ranks)])
            factors.append(float(longest.mean() / longest.max()))
        return sum(factors) / len(factors)

    assert efficiency(MicroBatches(data, 8, 0)) < 0.75
    batches = MicroBatches(data, 8, 0, by_length=True, step=8 * ranks)
    assert efficiency(batches) > least
    longest = [int(data.lengths[batches.samples(step * ranks)].max()) for step in range(10)]
    assert longest != sorted(longest, reverse=True)  # long ones do not come first


@pytest.mark.parametrize("streams", [None, 8], ids=["anywhere", "shards"])
def test_a_run_that_resumes_with_another_world_size_repeats_no_sample(streams):
    """8 ranks begin an epoch, 16 ranks with half the batch size and half as many samples a step read the rest."""
    data = LogNormal(streams, 4000)
    eight = MicroBatches(data, 8, 0, by_length=True, step=64)
    begun = {sample for number in range(480) for sample in eight.samples(number)}  # 96 %
    sixteen = MicroBatches(data, 4, 0, by_length=True, step=32)
    number = sixteen.resume(eight.state(480))
    rest = {sample for k in range(40) for sample in sixteen.samples(number + k)}
    assert len(begun) == 3840 and len(rest) == 160 and begun.isdisjoint(rest)
    with pytest.raises(UserError, match="resume with the former batch size"):
        MicroBatches(data, 7, 0, by_length=True, step=56).resume(eight.state(480))
    assert eight.resume(eight.state(481)) == 481  # the same size at any batch
