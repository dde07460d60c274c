"""What a test run leaves that is killed with SIGKILL, the next one removes."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.processes.own_network import hosts, namespaces_refused
from tests.processes.ownership import NAMESPACES, is_left, mark_of, own_name, processes

SLEEP = ("-c", "import time; print(flush=True); time.sleep(600)")
RUN = f"""
import os, pathlib, sys, time
from tests.processes.own_network import hosts
from tests.processes.ownership import own_folder, own_name
with own_folder() as folder, hosts("node", apart=sys.argv[1] == "apart") as there:
    there["node"].popen(*{SLEEP!r}, environ={{}}, output=folder / "out.log")
    while not (folder / "out.log").read_text():
        time.sleep(0.01)  # what execve(2) is about to replace shows no environment
    print(own_name(), flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("how", ["apart", "together"])
def test_what_a_killed_run_left_is_removed_by_the_next_one(how: str):
    if how == "apart" and (refused := namespaces_refused()):
        pytest.skip(refused)
    run = subprocess.Popen([sys.executable, "-c", RUN, how], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    name = run.stdout.readline().strip()

    def things() -> tuple[list[Path], list[Path], bool]:
        marked = processes(lambda each: mark_of(each).startswith(f"{name}/"))
        namespaces = [] if how == "together" else [*NAMESPACES.glob(f"{name}-*")]
        return marked, namespaces, Path(tempfile.gettempdir(), name).is_dir()

    try:
        before = things()
        assert len(before[0]) == 1
        assert len(before[1]) == (2 if how == "apart" else 0)
        assert before[2]
        with hosts("other", apart=False):
            assert things() == before  # whose run lives are left alone
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert things() == before
    with hosts("other", apart=False):
        assert things() == ([], [], False)


def test_a_later_process_of_the_same_number_is_another_one():
    assert not is_left(own_name())
    assert is_left(f"kelvin-{os.getpid()}-1")
    assert not is_left("kelvin-chaos-haz5lucq")
