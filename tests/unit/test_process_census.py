"""What processes hold and use, as /proc tells it."""

import os
import subprocess
import sys
import time
from pathlib import Path

from loadtest.process_census import cpu_seconds


def test_processor_time_is_told_by_process(tmp_path: Path) -> None:
    script = tmp_path / "busy.py"
    script.write_text("while True: pass")
    assert "busy" not in cpu_seconds(os.getpid())
    with subprocess.Popen([sys.executable, str(script)]) as busy:
        try:
            deadline = time.monotonic() + 30
            while not (used := cpu_seconds(os.getpid()).get("busy", 0.0)):
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            busy.kill()
    assert used < 30
