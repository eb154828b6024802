"""Jobs in threads: all of them, bounded, and errors come out."""

from __future__ import annotations

import threading

import pytest

from fabric_init.recording.replay.threads import threaded


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_every_job_is_run_once(workers: int) -> None:
    assert sorted(threaded(lambda job: job * 2, range(50), workers)) == list(range(0, 100, 2))


def test_jobs_are_asked_for_in_the_callers_thread_and_not_far_ahead() -> None:
    asked, threads = 0, set()

    def jobs():
        nonlocal asked
        for job in range(100):
            asked += 1
            threads.add(threading.get_ident())
            yield job

    for done, _ in enumerate(threaded(str, jobs(), 2)):
        assert asked <= done + 10
    assert threads == {threading.get_ident()}


def test_the_first_error_ends_the_rest() -> None:
    started = []

    def run(job: int) -> None:
        started.append(job)
        if job == 3:
            raise ValueError("the third")

    with pytest.raises(ValueError, match="the third"):
        list(threaded(run, range(1000), 2))
    assert len(started) < 50
