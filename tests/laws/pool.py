"""A few processes that stay: jobs that need several ranks are sent to them, so that starting is paid for once.

A job is a module-level function and its arguments, called on every rank inside a gloo process group. What each rank
returns comes back as a list. If a rank fails, its traceback is raised here; if one hangs, the pool is ended and the
next job starts a new one.
"""

from __future__ import annotations

import datetime
import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

_PRELOAD = ["torch", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "rankshift.run"]


class JobFailed(AssertionError):
    """A job raised on some rank; the text holds the traceback of each that did."""


class JobHung(AssertionError):
    """A job did not end in time."""


def join_gloo(rank: int, size: int, store: str) -> None:
    """What each process does first: one thread, one group that meets in a file."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # a launcher's variables, for code that asks for them
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )


class Pool:
    """``size`` processes, in one gloo group unless ``begin`` makes them something else, started on the first job."""

    def __init__(self, size: int, begin: Callable[[int, int, str], None] = join_gloo, grace: float = 3.0):
        self.size, self.begin = size, begin
        self.grace = grace  # seconds the other ranks get after one has failed, before they count as stuck
        self._processes: list[Any] = []
        self._pipes: list[multiprocessing.connection.Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, job: Callable[..., Any], *args: Any, timeout: float = 60.0, **kwargs: Any) -> list[Any]:
        """``job(*args, **kwargs)`` on every rank; what each returned, in the order of ranks."""
        if not self._processes:
            self._start()
        message = pickle.dumps((job, args, kwargs))
        for pipe in self._pipes:
            pipe.send_bytes(message)
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < self.size:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            ready = multiprocessing.connection.wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    answers[rank] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    self._processes[rank].join(1)
                    answers[rank] = False, f"the process died (exit code {self._processes[rank].exitcode})"
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + self.grace)
        failures = {rank: text for rank, (good, text) in sorted(answers.items()) if not good}
        if failures or len(answers) < self.size:
            stuck = sorted(set(range(self.size)) - set(answers))
            self.stop()  # a group in which one rank left a collective early is of no further use
            if failures:
                raise JobFailed("\n".join(f"rank {rank}:\n{text}" for rank, text in failures.items()))
            raise JobHung(f"{job.__qualname__}: ranks {stuck} gave no answer in {timeout} s")
        return [answers[rank][1] for rank in range(self.size)]

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        # forked from a server that has torch loaded: a process starts in a moment, and holds nothing of this one
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        self._folder = tempfile.TemporaryDirectory()
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(there, self.begin, rank, self.size, f"{self._folder.name}/store"),
                daemon=True,
            )
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)
        for pipe in self._pipes:
            pipe.recv_bytes()  # importing torch is slow on a busy machine: no job's time runs before that is done


def _serve(
    pipe: multiprocessing.connection.Connection,
    begin: Callable[[int, int, str], None],
    rank: int,
    size: int,
    store: str,
) -> None:
    """What a process of the pool does: take a job, answer, until the pipe closes."""
    begin(rank, size, store)
    pipe.send_bytes(b"ready")
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        try:
            job, args, kwargs = pickle.loads(message)
            answer = pickle.dumps((True, job(*args, **kwargs)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(answer)
