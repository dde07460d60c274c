"""NVIDIA's `aiperf` as it is published, in a virtual environment of its own, and what it reports.

It brings a gigabyte of packages and pins some that Kelvin pins otherwise, so it is no dependency:
it is installed once, by pip, under the user's cache.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from serve.errors import ConfigurationError, KelvinError
from serve.user_cache import user_cache

VERSION: Final = "0.13.0"
_INSTALL_WITHIN_S = 1800.0
_BESIDE_PROFILING_S = 300.0  # it starts a dozen processes and writes its reports
_GRACE_S = 60.0  # for pictures under way when its time is up
_PERCENTILES = ("p50", "p90", "p99", "max")


class ToolFailed(KelvinError):
    """The tool could not be installed, or did not come to its end."""

    code = "tool_failed"


def installed(executable: Path | None) -> Path:
    """Return the tool's executable; it is installed first where it is not.

    Args:
        executable: One that is there already; None: our own, of `VERSION`.

    Raises:
        ToolFailed: pip cannot install it.
    """
    if executable is not None:
        return executable
    folder = user_cache() / f"aiperf-{VERSION}"
    tool = folder / "bin" / "aiperf"
    done = folder / "installed"
    if done.exists():
        return tool
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted installation left
    _run(
        [sys.executable, "-m", "venv", str(folder)],
        _INSTALL_WITHIN_S,
        f"a Python that can make environments (Debian: python3-venv) and room in {folder.parent}, "
        "or another XDG_CACHE_HOME",
    )
    # Twice: only what makes it fail; of indexes that lack a package, pip warns for each.
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--quiet"]
    _run(
        [*pip, f"aiperf=={VERSION}"],
        _INSTALL_WITHIN_S,
        f"a package index that has aiperf {VERSION} (pip says above what it lacked); "
        "or --aiperf with one that is installed",
    )
    done.touch()
    return tool


def profile(
    tool: Path,
    url: str,
    model: str,
    tokenizer: Path,
    prompts: Sequence[str],
    folder: Path,
    *,
    seconds: float,
    concurrency: int,
    streaming: bool,
    body: Mapping[str, Any],
) -> dict[str, Any]:
    """Let the tool profile the OpenAI door and return the report it exports.

    Args:
        tool: Its executable.
        url: Of Kelvin.
        model: As the service names it.
        tokenizer: Folder of the tokenizer that it counts prompts' tokens with.
        prompts: Taken in turns.
        folder: Empty; its files go there.
        seconds: For so long it sends.
        concurrency: Requests under way at a time.
        streaming: Whether pictures come as server-sent events.
        body: Further fields of every request.

    Raises:
        ToolFailed: It reports nothing.
    """
    lines = "".join(json.dumps({"text": prompt}) + "\n" for prompt in prompts)
    (folder / "prompts.jsonl").write_text(lines, encoding="utf-8")
    command = [str(tool), "profile", "--model", model, "--url", url]
    command += ["--endpoint-type", "image-generation", *(["--streaming"] if streaming else [])]
    command += ["--tokenizer", str(tokenizer.resolve())]
    command += ["--input-file", str(folder / "prompts.jsonl")]
    command += ["--custom-dataset-type", "single-turn", "--concurrency", str(concurrency)]
    command += ["--benchmark-duration", f"{seconds:g}", "--benchmark-grace-period", f"{_GRACE_S:g}"]
    command += ["--no-gpu-telemetry", "--no-server-metrics", "--ui", "none"]
    command += ["--extra-inputs", json.dumps(dict(body)), "--artifact-dir", str(folder / "report")]
    code = _run(command, seconds + _GRACE_S + _BESIDE_PROFILING_S)
    file = folder / "report" / "profile_export_aiperf.json"
    try:
        exported: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ToolFailed("aiperf exported no report.", field="exit code", value=code) from None
    return exported | {"exit_code": code}


def figures(exported: Mapping[str, Any]) -> dict[str, Any]:
    """Return what matters of the tool's report; an absent number is 0, and NaN for a latency."""

    def average(name: str) -> float:
        return float((exported.get(name) or {}).get("avg") or 0.0)

    latency = exported.get("request_latency") or {}
    return {
        "requests": round(average("request_count")),
        "errors": round(average("error_request_count")),
        "error_summary": exported.get("error_summary") or [],
        "seconds": round(average("benchmark_duration"), 2),
        "requests_per_s": round(average("request_throughput"), 3),
        "latency_s": {
            name: round(float(latency.get(name) or math.nan) / 1e3, 3) for name in _PERCENTILES
        },
        "prompt_tokens": {
            "by_aiperf": round(average("total_isl")),
            "by_kelvin": round(average("total_usage_prompt_tokens")),
        },
        "is_complete": bool(exported.get("is_complete")) and not exported.get("was_cancelled"),
        "exit_code": exported["exit_code"],
    }


def faults(found: Mapping[str, Any], seconds: float, stored: int) -> list[str]:
    """Return what is wrong with a profile, in words; an empty list: nothing.

    Args:
        found: Of `figures`.
        seconds: That it was to last.
        stored: Pictures that Kelvin counted meanwhile.
    """
    wrong = []
    if found["errors"] or found["error_summary"]:
        wrong.append(f"{found['errors']} requests failed: {found['error_summary']}")
    if not found["requests"]:
        wrong.append("no request succeeded")
    if stored != found["requests"]:
        wrong.append(f"Kelvin stored {stored} pictures, aiperf received {found['requests']}")
    if found["seconds"] < seconds:
        wrong.append(f"it ended after {found['seconds']} s")
    if not found["is_complete"] or found["exit_code"]:
        wrong.append(f"it was cut short, exit code {found['exit_code']}")
    return wrong


def existing_tool(text: str) -> Path:
    """Return the path of an executable that is there.

    Raises:
        ConfigurationError: There is none.
    """
    found = shutil.which(text)
    if found is None:
        raise ConfigurationError(
            "There is no such executable.", field="--aiperf", value=text, allowed="aiperf's path"
        )
    return Path(found)


def _run(command: Sequence[str], within_s: float, remedy: str | None = None) -> int:
    """Return the exit status; with a remedy, one that is not 0 is an error.

    Raises:
        ToolFailed: It cannot be run, takes too long, or fails and must not.
    """
    try:
        code = subprocess.run(
            command, timeout=within_s, check=False, stdout=sys.stderr.fileno()
        ).returncode
    except subprocess.TimeoutExpired:
        raise ToolFailed("It took too long.", value=command[0], allowed=f"{within_s:g} s") from None
    except OSError as error:
        raise ToolFailed(
            f"It cannot be run: {error.strerror}.",
            field="command",
            value=command[0],
            allowed="an executable; one of our own is installed anew once its folder is removed",
        ) from None
    if code and remedy is not None:
        raise ToolFailed(
            f"{' '.join(command)} failed.", field="exit status", value=code, allowed=remedy
        )
    return code
