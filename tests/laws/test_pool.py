"""The pool itself: answers, failures and hangs."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from laws.pool import JobFailed, JobHung, Pool


def total(offset: float) -> tuple[int, float]:
    value = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(value)
    return os.getpid(), value.item()


def fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one is ill")
    dist.barrier()  # waits for a rank that will not come


def sleep() -> None:
    time.sleep(30)


def test_a_pool_answers_keeps_its_processes_and_survives_failure_and_hang(pool: Pool) -> None:
    (first, a), (_, b) = pool.run(total, 0.5)
    assert a == b == 2.0
    assert pool.run(total, 0.5)[0][0] == first, "the processes stay from job to job"
    with pytest.raises(JobFailed, match="rank one is ill"):
        pool.run(fail_on_one)
    with pytest.raises(JobHung, match="sleep"):
        pool.run(sleep, timeout=1)
    assert pool.run(total, 0.0)[1][1] == 1.0
