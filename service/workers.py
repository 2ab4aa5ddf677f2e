"""The threads of `scripts/serve.py` that run the models: requests of several clients share their batches."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.errors import UserError
from hicodit.pipeline import Crops, HiCoDiTPipeline
from talker_t2av.jobs import PreparedJob
from talker_t2av.pipeline import TalkerPipeline
from talker_t2av.request import MODES
from talker_t2av.running_batch import Row, RunningBatch

GATHER = 0.02  # seconds that the first of a batch waits for others


@dataclass(eq=False)
class Ticket:
    """A request on its way. cancelled: nobody waits for it any more.

    on_patch: called in the worker's thread with each new patch of speech (1, P, Ds).
    """

    job: Any
    seed: int = 0
    on_patch: Callable[[torch.Tensor], None] | None = None
    future: Future = field(default_factory=Future)
    cancelled: bool = False

    def succeed(self, result: Any) -> None:
        if not self.future.done():
            self.future.set_result(result)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Worker(threading.Thread):
    """Takes tickets from a queue. `running`: how many it works on."""

    def __init__(self, name: str, most: int) -> None:
        super().__init__(name=name, daemon=True)
        self.most, self.running, self.stopping = most, 0, False
        self.waiting: deque[Ticket] = deque()
        self.changed = threading.Condition()

    def submit(self, ticket: Ticket) -> Ticket:
        with self.changed:
            if self.stopping:
                raise UserError("the server is shutting down")
            self.waiting.append(ticket)
            self.changed.notify()
        return ticket

    def stop(self) -> None:
        """Let the thread end; what waits or runs fails."""
        with self.changed:
            self.stopping = True
            self.changed.notify()

    def take(self, room: int, wait: bool) -> list[Ticket]:
        """Up to `room` tickets that somebody still waits for; with `wait` not before there is one, or the end."""
        with self.changed:
            while wait and not self.waiting and not self.stopping:
                self.changed.wait()
            taken = []
            while self.waiting and len(taken) < room:
                ticket = self.waiting.popleft()
                if ticket.cancelled:
                    ticket.fail(UserError("cancelled"))
                else:
                    taken.append(ticket)
            return taken

    def fail_all(self, tickets: list[Ticket], error: Exception) -> None:
        for ticket in tickets:
            ticket.fail(error)


class LipWorker(Worker):
    """HiCoDiT: requests that wait are one batch; if that fails, it is done one by one, to find the request at fault."""

    def __init__(self, pipeline: HiCoDiTPipeline, most: int) -> None:
        super().__init__("hicodit", most)
        self.pipeline = pipeline

    def run(self) -> None:
        while not self.stopping:
            tickets = self.take(1, wait=True)
            if tickets and self.most > 1:
                time.sleep(GATHER)
                tickets += self.take(self.most - 1, wait=False)
            self.running = len(tickets)
            if tickets:
                self._run(tickets)
            self.running = 0
        self.fail_all([*self.waiting], UserError("the server is shutting down"))

    def _run(self, tickets: list[Ticket]) -> None:
        crops: list[Crops] = [ticket.job for ticket in tickets]
        try:
            results = self.pipeline.run(crops, [ticket.seed for ticket in tickets])
        except Exception as error:
            if len(tickets) == 1:
                tickets[0].fail(error)
            for ticket in tickets if len(tickets) > 1 else []:
                self._run([ticket])
            return
        for ticket, speech in zip(tickets, results):
            ticket.succeed(speech)


class TalkWorker(Worker):
    """Talker-T2AV: rows join a running batch of their mode and leave it when they end."""

    def __init__(self, pipeline: TalkerPipeline, most: int) -> None:
        super().__init__("talker", most)
        model = pipeline.system.model
        self.batches = {mode: RunningBatch(model, MODES[mode], pipeline.sampling) for mode in MODES}
        self.rows: dict[Row, Ticket] = {}

    def run(self) -> None:
        while not self.stopping:
            for ticket in self.take(self.most - len(self.rows), wait=not self.rows):
                self._join(ticket)
            for batch in self.batches.values():
                if batch.rows:
                    self._step(batch)
            self.running = len(self.rows)
        self.fail_all([*self.rows.values(), *self.waiting], UserError("the server is shutting down"))

    def _join(self, ticket: Ticket) -> None:
        job: PreparedJob = ticket.job
        try:
            self.rows[self.batches[job.job.mode].join(job.request, job.rules)] = ticket
        except Exception as error:
            ticket.fail(error)

    def _step(self, batch: RunningBatch) -> None:
        gone = [row for row in batch.rows if self.rows[row].cancelled]
        batch.leave(*gone)
        for row in gone:
            self.rows.pop(row).fail(UserError("cancelled"))
        if not batch.rows:
            return
        rows = [*batch.rows]
        try:
            ended = batch.step()
            for row in rows:
                sink = self.rows[row].on_patch
                if sink is not None and row.loop.drawn.get("speech"):
                    sink(row.loop.drawn["speech"][-1])
            for row in ended:
                self.rows.pop(row).succeed(row.result())
        except Exception as error:
            batch.leave(*batch.rows)
            for row in rows:
                if row in self.rows:
                    self.rows.pop(row).fail(error)
