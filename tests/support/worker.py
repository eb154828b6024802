"""Compares architectures named on stdin, one a line, and answers each with one line of JSON on stdout.

Other scripts do other work in the same way, through :func:`serve`.

A process of its own, so that a crash, a hang or a hunger for memory costs one architecture and not the test run.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_MOST_MEMORY = 24 << 30  # of addresses: maps count, and memory that is not touched. Perceiver alone takes 11 GiB
_EAGER_SECONDS = 25


class TooSlowError(Exception):
    pass


def _alarm(number: int, frame: FrameType | None) -> None:
    raise TooSlowError("too slow")


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise :class:`TooSlowError` after so much of the processor's time, whatever else the machine does meanwhile.

    Only where Python code runs then. Whoever asks waits no longer than he wants by the clock.
    """
    before = signal.signal(signal.SIGPROF, _alarm)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    except TooSlowError:
        raise TooSlowError(f"more than {seconds} s") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def buildable(model_class: Any) -> tuple[Any, str]:
    """A config maker from which plain PyTorch builds the class, or ``None`` and why there is none."""
    import torch

    from tests.support.architectures import configs

    why = ""
    errors: list[str] = []
    for make in configs(model_class):
        try:
            with at_most(_EAGER_SECONDS):
                torch.manual_seed(0)
                model_class(make())
                return make, ""
        except Exception as error:  # whatever eager code raises, the architecture cannot be built: that is the answer
            errors.append(brief(error))
            why = errors[0]
            if errors[-4:] == [errors[-1]] * 4:  # size is not what it is about
                break
    return None, why


def run(architecture: str) -> dict[str, Any]:
    from tests.support.architectures import model_classes
    from tests.support.identity import compare

    answer: dict[str, Any] = {"architecture": architecture, "models": [], "not_built": {}}
    try:
        classes = model_classes(architecture)
    except Exception as error:
        return {**answer, "not_built": {architecture: brief(error)}}
    if not classes:
        return {**answer, "not_built": {architecture: "no model class with a config"}}
    for model_class in classes:
        name = model_class.__name__
        start = time.perf_counter()
        make, why = buildable(model_class)
        if make is None:
            answer["not_built"][name] = why
            continue
        model: dict[str, Any] = {"name": name, "differences": [], "tensors": 0, "never_written": []}
        try:
            model.update(vars(compare(lambda model_class=model_class, make=make: model_class(make()))))
        except Exception:
            model["differences"] = [traceback.format_exc()]
        if not model["tensors"] and not model["differences"]:
            answer["not_built"][name] = "nothing to compare: no tensors"
            continue
        model["seconds"] = round(time.perf_counter() - start, 2)
        answer["models"].append(model)
    return answer


def serve(work: Callable[[str], dict[str, Any]]) -> None:
    """Answer what comes on stdin by what ``work`` returns, until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what models print must not get between the answers
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(work(line.strip())), file=answers, flush=True)


if __name__ == "__main__":
    serve(run)
