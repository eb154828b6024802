"""Run many small jobs in a few threads, and bound how many results are waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def threaded(run: Callable[[Job], Result], jobs: Iterable[Job], workers: int) -> Iterator[Result]:
    """Yield ``run(job)`` for each job, as they are completed; ``jobs`` is advanced in the caller's thread.

    Args:
        run: Called in one of the threads.
        jobs: At most ``2 * workers + 1`` of them are running or waiting at a time.
        workers: The number of threads. With one, jobs run in the caller's thread and in order.
    """
    if workers <= 1:
        yield from map(run, jobs)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="fabric-init-replay") as pool:
        running: set[Future[Result]] = set()
        try:
            for job in jobs:
                running.add(pool.submit(run, job))
                if len(running) > 2 * workers:  # keeps the workers busy and bounds the memory in flight
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            for future in running:
                future.cancel()
