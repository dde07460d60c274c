"""200 damaged files: each is refused by a typed error naming the file; memory stays bounded."""

import json
import random
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.builtin.pico import write_pico
from deployments.sd3.mmdit import load_transformer
from deployments.sd3.precision import PrecisionChoice
from loadtest.checkpoint_formats import write_comfyui
from serve.config import ModelSettings
from serve.errors import ConfigurationError
from serve.model_dir import resolve_model_dir

FP8 = PrecisionChoice("fp8", "fp8", torch.float32, "for a test")
NAME = "stable-diffusion-3.5-fp8.safetensors"
Entries = dict[str, dict[str, Any]]
Damage = Callable[[random.Random, bytes], bytes]


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pico in ComfyUI's folders."""
    root = tmp_path_factory.mktemp("damage")
    write_comfyui(write_pico(root / "pico"), root / "models", name=NAME, form="older")
    return root / "models"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine take twenty times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def taken_apart(data: bytes) -> tuple[Entries, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put_together(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def tensors(entries: Entries) -> list[str]:
    return [name for name in entries if name != "__metadata__"]


def cut_short(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def grown(rng: random.Random, data: bytes) -> bytes:
    return data + bytes(rng.randrange(1, 100))


def other_length(rng: random.Random, data: bytes) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    wrong = rng.choice([0, length - 1, length + 1, length * 2, 1 << 24, 1 << 40, (1 << 64) - 1])
    return struct.pack("<Q", wrong) + data[8:]


def fuzzed(rng: random.Random, data: bytes) -> bytes:
    """Some bytes of the tensors' entries, which all mean something."""
    entries, body = taken_apart(data)
    metadata = entries.pop("__metadata__")
    text = bytearray(json.dumps(entries, separators=(",", ":")).encode())
    for at in rng.sample(range(1, len(text) - 1), rng.randrange(1, 5)):
        text[at] = rng.choice([byte for byte in b'az09"{}[]:,\x00\xff' if byte != text[at]])
    head = b'{"__metadata__":' + json.dumps(metadata).encode() + b","
    return put_together(head + bytes(text[1:]), body)


def swapped(rng: random.Random, data: bytes) -> bytes:
    """Two tensors of different shapes under each other's names."""
    entries, body = taken_apart(data)
    weights = [n for n in tensors(entries) if n.endswith((".weight", ".bias"))]
    while True:
        one, other = rng.sample(weights, 2)
        if entries[one]["shape"] != entries[other]["shape"]:
            entries[one], entries[other] = entries[other], entries[one]
            return put_together(entries, body)


def without_one(rng: random.Random, data: bytes) -> bytes:
    """A weight renamed: one is missing and one has no place."""
    entries, body = taken_apart(data)
    name = rng.choice([n for n in tensors(entries) if n.endswith((".weight", ".bias"))])
    entries[name + rng.choice(["_", ".old", "2"])] = entries.pop(name)
    return put_together(entries, body)


def twice(rng: random.Random, data: bytes) -> bytes:
    entries, body = taken_apart(data)
    name = rng.choice(tensors(entries))
    text = json.dumps(entries).encode()
    again = json.dumps({name: entries[name]}).encode()
    return put_together(text[:-1] + b"," + again[1:], body)


def not_finite(rng: random.Random, data: bytes) -> bytes:
    """NaN among the weights or the scales; the header stays what it was."""
    entries, body = taken_apart(data)
    codes = {"F8_E4M3": b"\x7f", "F16": b"\x00\x7e", "F32": struct.pack("<f", float("nan"))}
    able = [
        n for n in tensors(entries) if entries[n]["dtype"] in codes and entries[n]["shape"] != [0]
    ]
    chosen = entries[rng.choice(able)]
    code = codes[chosen["dtype"]]
    begin, end = chosen["data_offsets"]
    at = begin + len(code) * rng.randrange((end - begin) // len(code))
    return data[: len(data) - len(body)] + body[:at] + code + body[at + len(code) :]


def other_dtype(rng: random.Random, data: bytes) -> bytes:
    entries, body = taken_apart(data)
    name = rng.choice([n for n in tensors(entries) if entries[n]["dtype"] == "F16"])
    entries[name]["dtype"] = rng.choice(["I16", "U16", "F8_E4M3", "F64", "NONE", "F4"])
    return put_together(entries, body)


def bomb(rng: random.Random, data: bytes) -> bytes:
    size = rng.randrange(1 << 16, 1 << 22)
    header = rng.choice(
        [
            b"[" * size,
            b'{"a":' * (size // 5),
            b'{"a":[' + b"1," * (size // 2) + b"1]}",
            b'{"a":' + b"9" * size + b"}",
            b'{"a":"' + b"x" * size + b'"}',
            b"[" + b"[]," * (size // 3) + b"[]]",
            json.dumps({f"t{at}": {} for at in range(size // 16)}).encode(),
        ]
    )
    return put_together(header, b"")


KINDS: list[Damage] = [
    cut_short,
    grown,
    other_length,
    fuzzed,
    swapped,
    without_one,
    twice,
    not_finite,
    other_dtype,
    bomb,
]


def damages(count: int) -> Iterator[tuple[str, Damage, int]]:
    for seed in range(count):
        kind: Damage = KINDS[seed % len(KINDS)]
        yield kind.__name__, kind, seed


def refusal(settings: ModelSettings) -> str | None:
    """Return what is said of the model; any other error than the typed one fails the test."""
    try:
        load_transformer(resolve_model_dir(settings), torch.device("cpu"), FP8)
    except ConfigurationError as error:
        return error.message
    return None


def test_damaged_files_are_refused_and_nothing_else_happens(models_dir: Path):
    checkpoint = models_dir / "checkpoints" / NAME
    whole = checkpoint.read_bytes()
    settings = ModelSettings(path=NAME, models_dir=str(models_dir))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = []
    for name, damage, seed in damages(200):
        damaged = damage(random.Random(seed), whole)
        assert damaged != whole
        checkpoint.write_bytes(damaged)
        message = refusal(settings)
        assert message is not None, f"{name} {seed} was taken for a model"
        assert NAME in message, (name, seed, message)
        assert len(message) < 3000
        refused.append(message)
    assert len(refused) == 200
    assert len(set(refused)) > 50
    grown_by = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_by < 600 << 10, f"{grown_by >> 10} MiB"
    checkpoint.write_bytes(whole)
    assert load_transformer(resolve_model_dir(settings), torch.device("cpu"), FP8)
