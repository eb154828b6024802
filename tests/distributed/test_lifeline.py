"""A process that others watch ends without a word, and they see that it has ended."""

from __future__ import annotations

import subprocess
import sys
import time

from fabric_init.distributed.lifeline import Lifeline

PROCESS = """
import sys
from fabric_init.distributed import lifeline

print(*lifeline.address_here(None, 0), flush=True)
sys.stdin.read()
vars(lifeline).clear()  # as the end of the interpreter does, with warnings or without
"""
SECONDS = 30


def test_a_process_is_seen_to_live_until_it_ends_and_warns_of_no_socket() -> None:
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", PROCESS]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        host, port = process.stdout.readline().split()
        lifeline = Lifeline((host, int(port)))
        assert not lifeline.is_cut()
        _, warned = process.communicate("", timeout=SECONDS)
    end = time.monotonic() + SECONDS
    while not lifeline.is_cut() and time.monotonic() < end:
        time.sleep(0.01)
    assert lifeline.is_cut()
    lifeline.close()
    assert "ResourceWarning" not in warned, warned
