"""The pool itself: answers, failures, hangs and deaths."""

from __future__ import annotations

import time

import pytest

from laws import jobs
from laws.pool import JobFailed, JobHung, Pool


def test_a_pool_answers_keeps_its_processes_and_survives_failure_hang_and_death() -> None:
    pool = Pool(2, jobs.begin, grace=0.2)
    try:
        (first, a), (second, b) = pool.run(jobs.whoami, 5)
        assert (a, b) == (5, 6)
        assert first != second
        assert pool.run(jobs.whoami, 0) == [(first, 0), (second, 1)], "the processes stay from job to job"
        start = time.monotonic()
        with pytest.raises(JobFailed, match=r"(?s)rank 1:.*ValueError: rank one is ill"):
            pool.run(jobs.fail_on_one)
        with pytest.raises(JobHung, match=r"sleep: ranks \[0, 1\]"):
            pool.run(jobs.sleep, timeout=0.2)
        with pytest.raises(JobFailed, match="rank 0:\nthe process died"):
            pool.run(jobs.die)
        assert time.monotonic() - start < 20, "nobody waited for those who slept"
        assert pool.run(jobs.whoami, 1)[1][1] == 2, "a new pool takes over"
    finally:
        pool.stop()
