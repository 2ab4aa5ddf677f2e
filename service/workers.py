"""Worker threads of the models. Requests of several clients share batches."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

import torch

from engine.errors import UserError
from hicodit.bundled import PipelineChooser
from hicodit.pipeline import HiCoDiTPipeline
from talker_t2av.generation import BatchedDecoder, Row
from talker_t2av.pipeline import TalkerPipeline
from talker_t2av.request import MODES, Mode

SERVED = ("tts", "t2av")  # modes of Talker-T2AV that requests may have
GATHER = 0.02  # seconds that the first request of a batch waits for others


class WorkerEnded(UserError):
    """The worker has stopped: the server is shutting down, or the thread died."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class Ticket(Future):
    """A request and its future result. `cancel` cancels it at the next patch.

    Attributes:
        job: `Crops` for HiCoDiT; for Talker-T2AV a `PreparedJob` with one request.
        seed, pipeline: arguments of HiCoDiT.
        on_patch: called in the worker's thread with each new patch of speech (1, P, Ds).
    """

    def __init__(
        self,
        job: Any,
        seed: int = 0,
        on_patch: Callable[[torch.Tensor], Any] = lambda patch: None,
        pipeline: HiCoDiTPipeline | None = None,
    ) -> None:
        super().__init__()
        self.job = job
        self.seed = seed
        self.on_patch = on_patch
        self.pipeline = pipeline

    def end(self, result: Any) -> None:
        """Set the result or exception, unless the ticket is cancelled."""
        with suppress(InvalidStateError):
            self.set_exception(result) if isinstance(result, Exception) else self.set_result(result)


class Worker(threading.Thread):
    """Thread of a model, with a queue of tickets and the tickets in progress (`running`)."""

    running: Sequence[Ticket]

    def __init__(self, name: str, batch_size: int) -> None:
        super().__init__(name=name, daemon=True)
        self.batch_size = batch_size
        self.stopping = False
        self.waiting: deque[Ticket] = deque()
        self.changed = threading.Condition()
        self.ready = threading.Event()  # set after `warm_up`, or when it failed

    def submit(self, ticket: Ticket) -> None:
        """Add a ticket to the queue.

        Raises:
            WorkerEnded: If the worker has stopped.
        """
        with self.changed:
            if self.stopping:
                raise WorkerEnded
            self.waiting.append(ticket)
            self.changed.notify()

    def run(self) -> None:
        """Process tickets until `stop`. If the thread fails, all of its tickets fail."""
        try:
            self.warm_up()
            self.ready.set()
            while not self.stopping:
                self.work()
        finally:
            self.stop()
            self.ready.set()
            for ticket in (*self.waiting, *self.running):
                ticket.end(WorkerEnded())

    def warm_up(self) -> None:
        """Capture the model's CUDA graphs, so that no request waits for a capture. Without a GPU this does nothing."""
        raise NotImplementedError

    def work(self) -> None:
        """Wait for tickets and advance them by one batch or step. `run` calls this until `stop`."""
        raise NotImplementedError

    def stop(self) -> None:
        """End the thread; all its tickets fail."""
        with self.changed:
            self.stopping = True
            self.changed.notify()

    def take(self, count: int, wait: bool) -> list[Ticket]:
        """Remove up to `count` tickets from the queue; with `wait`, block until there is one or the worker stops."""
        with self.changed:
            while wait and not self.waiting and not self.stopping:
                self.changed.wait()
            tickets = []
            while self.waiting and len(tickets) < count:
                if not (ticket := self.waiting.popleft()).cancelled():
                    tickets.append(ticket)
            return tickets


class HiCoDiTWorker(Worker):
    """Runs all waiting requests of a pipeline as one batch.

    If the batch fails, requests run separately, to find the failing one.
    """

    def __init__(self, pipelines: PipelineChooser, batch_size: int) -> None:
        super().__init__("hicodit", batch_size)
        self.pipelines = pipelines
        self.running = []

    def warm_up(self) -> None:
        for pipeline in self.pipelines.load_all():
            pipeline.warm_up(self.batch_size)

    def work(self) -> None:
        """Run all waiting requests, after waiting for `GATHER` seconds for further ones."""
        self.running = self.take(1, wait=True)
        if self.running and self.batch_size > 1:
            time.sleep(GATHER)
            self.running += self.take(self.batch_size - 1, wait=False)
        for pipeline in dict.fromkeys(ticket.pipeline for ticket in self.running):
            self.generate([ticket for ticket in self.running if ticket.pipeline is pipeline])
        self.running = []

    def generate(self, tickets: list[Ticket]) -> None:
        """Generate the speech of requests of one pipeline as a batch, and end their tickets.

        If the batch fails, each request runs separately.
        """
        try:
            crops = [ticket.job for ticket in tickets]
            seeds = [ticket.seed for ticket in tickets]
            results = tickets[0].pipeline.run(crops, seeds)
        except Exception as error:
            if len(tickets) > 1:
                for ticket in tickets:
                    self.generate([ticket])
                return
            results = [error]
        for ticket, result in zip(tickets, results):
            ticket.end(result)


class TalkerWorker(Worker):
    """Runs one batch per mode. Requests join a running batch, and leave it when they finish or are cancelled."""

    def __init__(self, pipeline: TalkerPipeline, batch_size: int) -> None:
        super().__init__("talker", batch_size)
        self.pipeline = pipeline
        self.batches: dict[Mode, BatchedDecoder] = {}
        self.rows: dict[Row, Ticket] = {}

    @property
    def running(self) -> list[Ticket]:
        """Tickets of the requests in the batches."""
        return list(self.rows.values())

    def warm_up(self) -> None:
        for name in SERVED:
            self.batch(MODES[name]).warm_up(self.pipeline.longest_part)

    def batch(self, mode: Mode) -> BatchedDecoder:
        """Return the batch of a mode, created on first use."""
        if mode not in self.batches:
            pipeline = self.pipeline
            self.batches[mode] = BatchedDecoder(
                pipeline.system.model,
                mode,
                pipeline.sampling,
                self.batch_size,
                check_every=1,
                compile=pipeline.compile,
            )
        return self.batches[mode]

    def work(self) -> None:
        """Let waiting requests join, and advance all batches by one patch."""
        for ticket in self.take(self.batch_size - len(self.rows), wait=not self.rows):
            self.join_batch(ticket)
        for batch in self.batches.values():
            self.step(batch)

    def join_batch(self, ticket: Ticket) -> None:
        """Add the request of a ticket to the running batch of its mode. End the ticket if that fails."""
        job = ticket.job
        try:
            row = self.batch(job.mode).join(job.requests[0])
            self.rows[row] = ticket
        except Exception as error:
            ticket.end(error)

    def step(self, batch: BatchedDecoder) -> None:
        """Remove cancelled requests, generate one patch of the others, and end the tickets of finished ones."""
        for row in [row for row in batch.active if self.rows[row].cancelled()]:
            batch.leave(row)
            del self.rows[row]
        if not (rows := [*batch.active]):
            return
        try:
            ended = batch.step()
            for row in rows:
                self.rows[row].on_patch(row.patches["speech"][-1][None])
            for row in ended:
                self.rows.pop(row).end(batch.result(row))
        except Exception as error:
            batch.leave(*batch.active)
            for row in rows:
                if row in self.rows:
                    self.rows.pop(row).end(error)
