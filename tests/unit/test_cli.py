"""The command line without a server: what it refuses, what it prints, how it ends."""

import json
import os
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from serve.__main__ import main
from serve.commands.generate import request_from
from serve.commands.overrides import settings_from_options
from serve.errors import ConfigurationError, InvalidRequest
from serve.generate_command import pair
from serve.requests import GenerateRequest

ROOT = Path(__file__).parents[2]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """Run with --json; stdout must be exactly one JSON object on one line."""
    code, out, _ = run(capsys, *arguments, "--json")
    (line,) = out.splitlines()
    body: dict[str, Any] = json.loads(line)["error"]
    return code, body


def kelvin(*arguments: str | bytes, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "serve", *arguments], capture_output=True, cwd=ROOT, **options
    )


def test_help_teaches_by_example() -> None:
    done = kelvin("--help")
    assert done.returncode == 0
    for example in (b"kelvin demo", b"kelvin up", b'kelvin generate "a large red circle'):
        assert example in done.stdout


def test_help_and_generate_load_nothing_heavy() -> None:
    # A command that thinks for three seconds before it refuses a typing mistake is not used.
    script = (
        "import sys; from serve.__main__ import main; main(['generate', 'x', '--width', '17']);"
        "heavy = {'torch', 'ray', 'botocore', 'diffusers', 'transformers'} & set(sys.modules);"
        "sys.exit(','.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_installed_command_is_this_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["kelvin"] == "serve.__main__:main"


def test_every_field_of_the_contract_has_its_option() -> None:
    done = kelvin("generate", "--help", env={**os.environ, "COLUMNS": "200"})
    shown = done.stdout.decode()
    hidden = {"prompt", "negative_prompt_2", "negative_prompt_3", *GenerateRequest.RESERVED}
    for name in GenerateRequest.model_fields.keys() - hidden:
        assert f"--{name.replace('_', '-')}" in shown


@pytest.mark.parametrize(
    "command", ["up", "generate", "doctor", "demo", "loadtest", "cluster plan", "status", "drain"]
)
def test_help_cuts_no_name_short_at_80_columns(command: str) -> None:
    done = kelvin(*command.split(), "--help", env={**os.environ, "COLUMNS": "80"})
    assert done.returncode == 0
    assert "…" not in done.stdout.decode()


def test_an_interval_is_taken_with_or_without_the_brackets_of_json() -> None:
    assert pair("0.2,0.9") == pair("[0.2, 0.9]") == [0.2, 0.9]


@pytest.mark.parametrize("option", ["--guidance-interval", "--negative-prompt-range"])
def test_an_interval_without_a_comma_is_told_its_form(
    capsys: pytest.CaptureFixture[str], option: str
) -> None:
    _, error = error_of(capsys, "generate", "x", option, "0.9", "0.2")
    assert "LOW,HIGH with a comma" in error["allowed"]


BAD_OPTIONS = [
    ((), "prompt"),
    (("",), "prompt"),
    (("  \n",), "prompt"),
    (("x" * 10_001,), "prompt"),
    (("x", "--negative-prompt", "x" * 10_001), "negative_prompt"),
    (("x", "--width", "17"), "width"),
    (("x", "--width", "0"), "width"),
    (("x", "--height", "-16"), "height"),
    (("x", "--height", "tall"), "height"),
    (("x", "--width", "64.0"), "width"),
    (("x", "--steps", "0"), "num_inference_steps"),
    (("x", "--num-inference-steps", "1000000000"), "num_inference_steps"),
    (("x", "--steps", "many"), "num_inference_steps"),
    (("x", "--guidance-scale", "nan"), "guidance_scale"),
    (("x", "--guidance-scale", "inf"), "guidance_scale"),
    (("x", "--guidance-scale", "-1"), "guidance_scale"),
    (("x", "--shift", "0"), "shift"),
    (("x", "--guidance-interval", "0.9,0.1"), "guidance_interval"),
    (("x", "--guidance-interval", "0.9"), "guidance_interval.1"),
    (("x", "--guidance-interval", "low,0.1"), "guidance_interval.0"),
    (("x", "--negative-prompt-range", "0,0.1,1"), "negative_prompt_range"),
    (("x", "--priority", "11"), "priority"),
    (("x", "--priority", "high"), "priority"),
    (("x", "--deadline", "0"), "deadline_s"),
    (("x", "--deadline-s", "inf"), "deadline_s"),
    (("x", "--preview-every", "-1"), "preview_every"),
    (("x", "--sampler", "eulr"), "sampler"),
    (("x", "--scheduler", "karras"), "scheduler"),
    (("x", "--seed", "-1"), "seed"),
    (("x", "--seed", str(2**64)), "seed"),
    (("x", "--num-images", "17"), "num_images"),
    (("x", "--format", "gif"), "output_format"),
    (("x", "--quality", "0"), "quality"),
    (("x", "--model", ""), "model"),
    (("x", "--stepz", "3"), "--stepz"),
    (("x", "--url", "localhost"), "url"),
    (("x", "-o", "out.gif"), "output"),
    (("x", "-o", "out.png", "--format", "webp"), "output"),
    (("x", "-o", "no/such/folder/out.png"), "output"),
    (("--from", "no-such-picture.png"), "from"),
]


@pytest.mark.parametrize(("options", "field"), BAD_OPTIONS)
def test_bad_options_end_in_a_typed_error(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...], field: str
) -> None:
    code, error = error_of(capsys, "generate", *options)
    assert code == 2
    assert error["field"] == field
    assert error["message"]
    assert error["allowed"]
    assert len(json.dumps(error)) < 1_000  # a huge prompt is not echoed


def test_a_person_is_told_field_value_and_what_is_allowed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = run(capsys, "generate", "[bold]x[/]", "--width", "17")
    assert (code, out) == (2, "")
    for part in ("Error:", "width", "17", "a multiple of 16"):
        assert part in err
    assert "Traceback" not in err


def test_a_prompt_that_is_not_utf8_is_refused() -> None:
    done = kelvin("generate", b"caf\xe9", "--json", env={**os.environ, "PYTHONUTF8": "1"})
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["field"] == "prompt"
    assert b"Traceback" not in done.stderr


def test_no_server_is_said_with_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    # Bound and not listening: nobody answers, and nobody else can take the port meanwhile.
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{holder.getsockname()[1]}"
        code, error = error_of(capsys, "generate", "x", "--url", url)
    assert code == 1
    assert error["code"] == "server_unreachable"
    assert "kelvin up" in error["allowed"]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (("--set", "storage"), "set"),
        (("--set", "=x"), "set"),
        (("--set", "storage.bukket=x"), "storage.bukket"),
        (("--set", "storage.bucket.name=x", "--set", "storage.bucket=y"), "storage.bucket"),
        (("--set", "storage.bucket=x", "--set", "storage.bucket.name=y"), "set"),
        (("--set", "denoiser.num_replicas=0"), "denoiser.0.num_replicas"),
        (("--set", "text_encoder.name=denoiser"), "pools"),
        (("--set", "vae_decoder.name=pipeline"), "pools"),
        (("--set", "model=pico", "--model", "pico"), "set"),
        (("--set", "_env_file=x"), "_env_file"),
        (("--set", "_cli_parse_args=1"), "_cli_parse_args"),
        (("--port", "70000"), "http.port"),
        (("--port", "http"), "http.port"),
        (("--config", "no-such-file.yaml"), "config"),
        (("--model", "/no/such/folder", "--port", "0"), "model.path"),
    ],
)
def test_up_refuses_bad_settings_before_it_starts_anything(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...], field: str
) -> None:
    code, error = error_of(capsys, "up", *options)
    assert code == 2
    assert error["field"] == field


def test_up_says_that_its_port_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, error = error_of(capsys, "up", "--port", str(taken.getsockname()[1]))
    assert code == 2
    assert error["field"] == "http.port"
    assert "--port 0" in error["allowed"]


def test_settings_come_from_the_file_then_the_environment_then_the_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "kelvin.yaml"
    file.write_text(
        "storage: {bucket: from-file, region: file-region, prefix: file}\n"
        "denoiser: [{name: denoiser-l4, num_gpus: 1, num_replicas: 3}]\n"
    )
    monkeypatch.setenv("KELVIN_STORAGE__REGION", "environment-region")
    monkeypatch.setenv("KELVIN_STORAGE__PREFIX", "environment")
    settings = settings_from_options(
        file, ["storage.prefix=option", "denoiser.num_replicas=2"], model="pico", port=0
    )
    storage = settings.storage
    assert (storage.bucket, storage.region) == ("from-file", "environment-region")
    assert storage.prefix == "option/"
    (pool,) = settings.denoiser
    assert (pool.name, pool.num_gpus, pool.num_replicas) == ("denoiser-l4", 1, 2)
    assert (settings.model.path, settings.http.port) == ("pico", 0)


def test_a_value_that_yaml_cannot_read_is_a_settings_error() -> None:
    with pytest.raises(ConfigurationError):
        settings_from_options(None, ["http.port=[1"])


def test_the_output_suffix_chooses_the_format() -> None:
    for suffix, expected in (
        (".png", "png"),
        (".JPG", "jpeg"),
        (".jpeg", "jpeg"),
        (".webp", "webp"),
    ):
        assert request_from({"prompt": "x"}, output=Path(f"out{suffix}")).output_format == expected


def test_a_picture_is_made_again_from_itself_and_options_win(tmp_path: Path) -> None:
    import numpy as np

    from serve.pictures import encode_picture

    made = GenerateRequest(prompt="a red circle", width=64, height=32, seed=7, shift=2.0)
    picture = tmp_path / "made.png"
    picture.write_bytes(encode_picture(np.zeros((32, 64, 3), np.uint8), made, seed=7))
    assert request_from({}, remake=picture) == made
    changed = request_from({"seed": 8, "prompt": "a blue square"}, remake=picture)
    assert (changed.seed, changed.prompt, changed.shift) == (8, "a blue square", 2.0)
    assert request_from({}, remake=picture, output=Path("x.webp")).output_format == "webp"


def test_a_file_that_holds_no_request_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "notes.png"
    file.write_bytes(b"no picture")
    with pytest.raises(InvalidRequest):
        request_from({}, remake=file)


def test_demo_refuses_what_its_checker_cannot_read(capsys: pytest.CaptureFixture[str]) -> None:
    code, error = error_of(capsys, "demo", "--prompt", "a horse in the rain")
    assert (code, error["field"]) == (2, "prompt")
    assert "red circle" in error["allowed"]
