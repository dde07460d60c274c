"""The command line against real servers: pictures, bad input, a bad store."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

from serve.__main__ import main
from serve.config import StorageSettings
from serve.local import LocalKelvin
from serve.pictures import read_request
from tests.ray.world import World

ROOT = Path(__file__).parents[2]
Cli = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command with --json; stdout must be exactly one JSON object on one line."""

    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        code = main([*arguments, "--json"])
        (line,) = capsys.readouterr().out.splitlines()
        body: dict[str, Any] = json.loads(line)
        return code, body

    return run


@pytest.fixture
def kelvin(world: World) -> LocalKelvin:
    assert world.kelvin is not None
    return world.kelvin


@pytest.fixture
def generate(cli: Cli, kelvin: LocalKelvin) -> Cli:
    return lambda *arguments: cli("generate", "--url", kelvin.url, *arguments)


def test_a_picture_lands_in_the_file_that_was_named(generate: Cli, tmp_path: Path) -> None:
    file = tmp_path / "out.png"
    file.write_bytes(b"what was there before")
    code, result = generate("a red circle", "-o", str(file), "--steps", "3", "--seed", "5")
    assert code == 0
    assert result["files"] == [str(file)]
    (image,) = result["images"]
    assert hashlib.sha256(file.read_bytes()).hexdigest() == image["sha256"]
    made = read_request(file)
    assert (made.prompt, made.num_inference_steps, made.seed) == ("a red circle", 3, 5)


def test_a_picture_is_made_again_from_itself(generate: Cli, tmp_path: Path) -> None:
    first, again, other = (tmp_path / f"{name}.png" for name in ("first", "again", "other"))
    generate("a red circle", "-o", str(first), "--steps", "3")
    generate("--from", str(first), "-o", str(again))
    generate("--from", str(first), "-o", str(other), "--seed", "1")
    assert again.read_bytes() == first.read_bytes()
    assert other.read_bytes() != first.read_bytes()


def test_several_pictures_become_several_files(generate: Cli, tmp_path: Path) -> None:
    code, result = generate(
        "a red circle", "-o", str(tmp_path / "out.webp"), "--num-images", "3", "--steps", "2"
    )
    assert code == 0
    names = [Path(file).name for file in result["files"]]
    assert names == ["out-0.webp", "out-1.webp", "out-2.webp"]
    assert len({Path(file).read_bytes() for file in result["files"]}) == 3


def test_prompts_can_be_kept_out_of_the_file(generate: Cli, tmp_path: Path) -> None:
    file = tmp_path / "out.png"
    generate("a secret circle", "--no-embed-prompt", "-o", str(file), "--steps", "1")
    assert b"secret" not in file.read_bytes()


def test_a_person_sees_the_file_name_and_nothing_else_on_stdout(
    kelvin: LocalKelvin, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "out.png"
    code = main(["generate", "x", "--url", kelvin.url, "-o", str(file), "--steps", "1"])
    assert (code, capsys.readouterr().out) == (0, f"{file}\n")


def test_a_prompt_too_long_for_the_encoders_is_warned_of(generate: Cli, tmp_path: Path) -> None:
    prompt = "a red circle " * 200
    code, result = generate(prompt, "-o", str(tmp_path / "out.png"), "--steps", "1")
    assert code == 0
    assert any("CLIP" in warning for warning in result["warnings"])


# What only the server knows; tests/unit/test_cli.py has what the contract knows.
BAD_INPUT: list[tuple[list[str], dict[str, Any], str]] = [
    (["--width", "1048576"], {"width": 1_048_576}, "width"),
    (["--height", "65536"], {"height": 65_536}, "height"),
    (["--model", "no-such-model"], {"model": "no-such-model"}, "model"),
]


@pytest.mark.parametrize(("options", "fields", "field"), BAD_INPUT)
def test_bad_input_is_refused_in_the_words_of_http(
    generate: Cli,
    kelvin: LocalKelvin,
    options: list[str],
    fields: dict[str, Any],
    field: str,
) -> None:
    code, said = generate("x", *options)
    answer = httpx.post(f"{kelvin.url}/v1/jobs", json={"prompt": "x", **fields}, trust_env=False)
    assert code == 2
    assert said["error"]["field"] == field
    assert said == answer.json()


def test_a_server_of_another_kind_is_said(cli: Cli, s3: StorageSettings) -> None:
    code, said = cli("generate", "x", "--url", str(s3.endpoint_url))
    assert code == 1
    assert said["error"]["code"] == "unexpected_answer"


def test_the_readme_lists_every_route(kelvin: LocalKelvin) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    paths = httpx.get(f"{kelvin.url}/openapi.json", trust_env=False).json()["paths"]
    assert len(paths) > 3
    for path, methods in paths.items():
        for method, route in methods.items():
            # Doors for other programs' clients have those' routes, each in a passage of its own.
            if "tags" not in route:
                assert f"`{method.upper()} {path.replace('job_id', 'id')}" in readme


def test_the_python_of_the_readme_runs(kelvin: LocalKelvin) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = readme.split("```python")[1].split("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", block],
        capture_output=True,
        cwd=ROOT,
        # "auto" takes this one; another Ray may run on the machine that runs the tests.
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert "http://" in done.stdout.decode()
    assert "stored" in done.stdout.decode()


def _closed_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


closed_port = pytest.fixture(_closed_port)


def _wrong_credentials(folder: Path) -> str:
    file = folder / "credentials"
    file.write_text("[default]\naws_access_key_id = nobody\naws_secret_access_key = n0thing\n")
    return str(file)


@pytest.mark.parametrize("command", ["up", "doctor"])
@pytest.mark.parametrize("fault", ["unreachable", "no bucket", "wrong credentials"])
def test_a_bad_store_is_said_before_anything_starts(
    cli: Cli, s3: StorageSettings, closed_port: int, tmp_path: Path, command: str, fault: str
) -> None:
    settings = {
        "endpoint_url": s3.endpoint_url,
        "bucket": s3.bucket,
        "credentials_file": s3.credentials_file,
        "max_attempts": 1,
    } | {
        "unreachable": {"endpoint_url": f"http://127.0.0.1:{closed_port}"},
        "no bucket": {"bucket": "no-such-bucket"},
        "wrong credentials": {"credentials_file": _wrong_credentials(tmp_path)},
    }[fault]
    sets = [
        part for name, value in settings.items() for part in ("--set", f"storage.{name}={value}")
    ]
    port = ["--port", "0"] if command == "up" else []
    code, said = cli(command, "--model", "pico", *port, *sets)
    assert code == 1
    if command == "up":
        assert said["error"]["code"] == "storage_unavailable"
        assert said["error"]["allowed"]
    else:
        assert not said["ok"]
        bad = [check for check in said["checks"] if check["verdict"] == "failed"]
        assert bad
        assert all(check["name"].startswith("store") and check["remedy"] for check in bad)
    assert "n0thing" not in json.dumps(said)


def test_doctor_finds_this_machine_fit(cli: Cli) -> None:
    code, said = cli("doctor", "--model", "pico")
    assert code == 0, said
    names = {check["name"] for check in said["checks"]}
    assert {"python", "torch", "gpu", "driver", "precision", "ray", "disk", "model"} <= names
    assert any("conditional" in name for name in names)
