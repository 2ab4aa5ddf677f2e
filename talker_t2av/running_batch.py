"""A batch that rows join and leave while it runs: continuous batching of requests of one mode.

All rows write their next token at one place of the cache. A row that joins has its prompt put right before that place,
and what lies further left is masked for it, as padding is in `PatchLoop`; its positions count from its own first token.

Axes: B rows, T prompt tokens, H heads, N places of the cache, h head width, P frames of a patch, C channels, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import StaticCache

from engine.errors import UserError
from talker_t2av.generation import PatchLoop, Result, Stream
from talker_t2av.model import TalkerT2AV
from talker_t2av.request import LoopRules, Mode, Request, Sampling, tokens_per_patch

ROOM = 64  # places by which the cache grows


@dataclass(eq=False)
class Row:
    """One request. loop: its prompt, noise and conditions, and what was drawn. padding: places before its first token.

    index: patches that were drawn. ended: after how many it ended; None while it runs.
    """

    loop: PatchLoop
    padding: int
    index: int = 0
    hits: int = 0
    ended: int | None = None

    def result(self) -> Result:
        """What was drawn, once it has ended."""
        self.loop.state.end = torch.tensor([self.ended])
        return self.loop.results()[0]


class RunningBatch:
    """Rows of one mode, one patch of all at each `step`; a row that ends leaves by itself.

    Raises:
        UserError: the model has interleaved tokens (order av or va), two a patch; this loop feeds one.
    """

    def __init__(self, model: TalkerT2AV, mode: Mode, sampling: Sampling) -> None:
        if tokens_per_patch(model.config.order, mode.motion != "absent") > 1:
            raise UserError(f"this model has order={model.config.order}: the service takes models with order=add only")
        self.model, self.mode, self.sampling = model, mode, sampling
        self.rows: list[Row] = []
        self.place = -1  # of the last token
        self.keys: list[Tensor] = []  # (B, H, N, h) of each layer
        self.values: list[Tensor] = []
        self.hidden = torch.empty(0)  # (B, D)
        self.context: dict[Stream, Tensor] = {}
        self.conditions: dict[Stream, Tensor] = {}

    @torch.no_grad()
    def join(self, request: Request, rules: LoopRules) -> Row:
        """Compute a request's prompt and let it take part from the next step on.

        Raises:
            UserError: as `PatchLoop` does.
        """
        loop = PatchLoop(self.model, [request], self.mode, self.sampling, rules)
        if not self.rows:
            self.place, self.keys, self.values = loop.longest - 1, [], []
        self._shift(max(0, loop.longest - 1 - self.place))
        row = Row(loop, self.place + 1 - loop.longest)
        self._make_room(loop.steps)
        pad = (0, 0, row.padding, self._places() - row.padding - loop.longest)
        layers = loop.state.cache.layers
        new = [[F.pad(x[:, :, : loop.longest], pad) for x in (layer.keys, layer.values)] for layer in layers]
        first, state = not self.rows, loop.state
        self.keys = [k if first else torch.cat([old, k]) for (k, _), old in zip(new, self.keys or new)]
        self.values = [v if first else torch.cat([old, v]) for (_, v), old in zip(new, self.values or new)]
        self.hidden = state.hidden if first else torch.cat([self.hidden, state.hidden])
        for own, theirs in ((self.context, state.context), (self.conditions, loop.conditions)):
            own.update({s: x if first else torch.cat([own[s], x]) for s, x in theirs.items()})
        state.cache = None
        self.rows.append(row)
        return row

    def leave(self, *gone: Row) -> None:
        """Take rows out."""
        keep = [i for i, row in enumerate(self.rows) if row not in gone]
        if len(keep) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in keep]
        self.keys, self.values = [x[keep] for x in self.keys], [x[keep] for x in self.values]
        self.hidden = self.hidden[keep]
        for own in (self.context, self.conditions):
            own.update({stream: x[keep] for stream, x in own.items()})
        if self.rows and (least := min(row.padding for row in self.rows)) >= ROOM:
            self._shift(-least)

    @torch.no_grad()
    def step(self) -> list[Row]:
        """One patch of all rows; gives those that ended with it, which have left."""
        token = torch.cat([row.loop.known[row.index] for row in self.rows])
        for stream in self.context:
            token = token + self._draw(stream)
        self._advance(token)
        tested = self.model.head_stop(self.hidden).sigmoid().tolist() if self.rows[0].loop.asks_stop else []
        for i, row in enumerate(self.rows):
            row.index += 1
            hit = bool(tested) and tested[i] >= 0.5 and row.index >= int(row.loop.first_test)
            row.hits = row.hits + 1 if hit else 0
            if row.index == row.loop.steps or row.hits >= row.loop.rules.stop_hits:
                row.ended = row.index
        done = [row for row in self.rows if row.ended is not None]
        self.leave(*done)
        return done

    def _draw(self, stream: Stream) -> Tensor:
        """The next patch of a stream for all rows; gives its tokens (B, D), zero where the stream has not begun."""
        numbers = [row.index - (row.loop.delay if stream == "motion" else 0) for row in self.rows]
        noise = torch.cat([row.loop.noise[stream][max(0, n)] for row, n in zip(self.rows, numbers)])
        begun = torch.tensor([n >= 0 for n in numbers], device=noise.device)[:, None]
        context, condition = self.context[stream], self.conditions[stream]
        patch, token, after = self.rows[0].loop.draw(stream, noise, self.hidden, context, condition)
        self.context[stream] = torch.where(begun[..., None], after, context)
        for row, n, own in zip(self.rows, numbers, patch.split(1)):
            if n >= 0:
                row.loop.drawn[stream].append(own)
        return torch.where(begun, token, 0)

    def _advance(self, token: Tensor) -> None:
        """Feed tokens (B, D) to the backbone, at the next place."""
        self._make_room(1)
        self.place += 1
        padding = torch.tensor([[row.padding] for row in self.rows], device=token.device)
        key = torch.arange(self._places(), device=token.device)
        visible = (key >= padding) & (key <= self.place)
        # Made anew: transformers' cache can neither grow nor change its number of rows.
        cache = StaticCache(self.model.llm.config, max_cache_len=self._places())
        for layer, keys, values in zip(cache.layers, self.keys, self.values):
            layer.keys, layer.values, layer.dtype, layer.device = keys, values, keys.dtype, keys.device
            layer.is_initialized = True
            layer.cumulative_length = torch.tensor(self.place, device=keys.device)
        self.hidden = self.model.continue_cache(cache, token[:, None], visible[:, None], self.place - padding)

    def _places(self) -> int:
        """Places of the cache; of an empty one, those that the first row's prompt takes."""
        return self.keys[0].shape[2] if self.keys else self.place + 1

    def _make_room(self, tokens: int) -> None:
        """Let the cache hold so many more tokens; it grows by multiples of `ROOM`."""
        missing = self.place + 1 + tokens - self._places()
        if missing > 0 and self.keys:
            more = -(-missing // ROOM) * ROOM
            self.keys, self.values = ([F.pad(x, (0, 0, 0, more)) for x in xs] for xs in (self.keys, self.values))

    def _shift(self, by: int) -> None:
        """Move all rows to later places (by > 0) or earlier ones."""
        if not by or not self.keys:
            return
        cut = (0, 0, by, 0)  # negative padding cuts
        self.keys, self.values = ([F.pad(x, cut) for x in xs] for xs in (self.keys, self.values))
        self.place += by
        for row in self.rows:
            row.padding += by
