"""A brief thread's work is done, and neither it nor its OpenMP team is there afterwards."""

import subprocess
import sys
import threading

import pytest
import torch

from deployments.brief_thread import in_brief_thread

CPU = torch.device("cpu")
# In a process of its own: what is counted are all of its threads.
TEAMS = """
import time
from pathlib import Path
import torch
from deployments.brief_thread import in_brief_thread
torch.set_num_threads(2)
def work():
    torch.ones(1 << 20).exp_()
count = lambda: len(list(Path("/proc/self/task").iterdir()))
before = count()
in_brief_thread(torch.device("cpu"), work)
deadline = time.monotonic() + 30  # the kernel takes a moment
while count() > before and time.monotonic() < deadline:
    time.sleep(0.01)
print(count() - before)
work()
print(count() - before)
"""


def test_it_returns_what_was_made_and_its_thread_is_gone():
    thread = in_brief_thread(CPU, threading.current_thread)
    assert thread is not threading.current_thread()
    assert not thread.is_alive()


def test_it_raises_what_was_raised():
    def fail() -> None:
        raise ValueError("no such weights")

    with pytest.raises(ValueError, match="no such weights"):
        in_brief_thread(CPU, fail)


def test_on_a_card_nothing_is_carried_elsewhere():
    assert in_brief_thread(torch.device("cuda"), threading.current_thread) is (
        threading.current_thread()
    )


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_its_team_is_gone_where_one_of_this_thread_stays():
    ran = subprocess.run(
        [sys.executable, "-c", TEAMS], capture_output=True, text=True, check=True, timeout=120
    )
    assert ran.stdout.split() == ["0", "1"]
