"""Which objects are a model's files, in which ranges they come, and what they are checked by."""

from __future__ import annotations

import base64
import hashlib
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import ConfigurationError
from serve.model_cache.checksums import PartDigests, checksum_of, digests_of, parts_in
from serve.model_cache.ranges import PIECE_BYTES, ranges_of
from serve.model_cache.remote_files import Source, chosen, index_in, not_there, source_of

SIZES = st.one_of(st.integers(0, 3 * PIECE_BYTES), st.just(PIECE_BYTES))
INDEX = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "X"], "vae": []}


@given(size=SIZES, part=st.none() | st.integers(1 << 20, 3 * PIECE_BYTES))
def test_ranges_are_the_object_in_order_and_divide_no_part(size: int, part: int | None):
    ranges = ranges_of(size, part)
    at = 0
    for each in ranges:
        assert each.begin == at
        assert each.length > 0
        assert part is None or each.begin % part == 0
        assert each.length <= max(PIECE_BYTES, part or 0)
        assert each.header == f"bytes={at}-{at + each.length - 1}"
        at += each.length
    assert at == size


@given(data=st.binary(min_size=1, max_size=3000), part=st.integers(1, 700), cut=st.integers(1, 99))
def test_parts_are_hashed_as_bytes_come(tmp_path_factory, data: bytes, part: int, cut: int):
    pieces = [data[begin : begin + part] for begin in range(0, len(data), part)]
    md5s = b"".join(hashlib.md5(piece).digest() for piece in pieces)
    crcs = b"".join(zlib.crc32(piece).to_bytes(4, "big") for piece in pieces)
    etag = f'"{hashlib.md5(md5s).hexdigest()}-{len(pieces)}"'
    crc = base64.b64encode(zlib.crc32(crcs).to_bytes(4, "big")).decode()
    file = tmp_path_factory.getbasetemp() / "hashed"
    file.write_bytes(data)
    assert parts_in(etag) == len(pieces)
    for told in (None, {"ChecksumCRC32": f"{crc}-{len(pieces)}"}):
        checksum = checksum_of(etag, len(data), part, told)
        assert checksum is not None
        assert checksum.algorithm == ("crc32" if told else "md5")
        come = PartDigests(checksum.algorithm, part)
        for begin in range(0, len(data), cut):
            come.take(memoryview(data)[begin : begin + cut])
        assert checksum.is_of(come.digests)
        with file.open("rb") as opened:
            assert checksum.is_of(digests_of(opened.fileno(), len(data), checksum))
        file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        with file.open("rb") as opened:
            assert not checksum.is_of(digests_of(opened.fileno(), len(data), checksum))
        file.write_bytes(data)


@pytest.mark.parametrize(
    ("etag", "part", "told", "by"),
    [
        (f'"{"a" * 32}"', None, {}, "md5"),
        (f'"{"a" * 32}-2"', 5, {}, "md5"),
        (f'"{"a" * 32}-1"', None, {}, "md5"),
        (f'"{"a" * 32}-2"', None, {}, None),  # a store that tells no parts
        (f'"{"a" * 32}-3"', 5, {}, None),  # parts of different lengths
        ('"no MD5 at all"', 5, {}, None),
        (
            '"no MD5 at all"',
            None,
            {"ChecksumSHA256": base64.b64encode(bytes(32)).decode()},
            "sha256",
        ),
        (
            '"no MD5 at all"',
            5,
            {"ChecksumCRC32": base64.b64encode(bytes(4)).decode() + "-2"},
            "crc32",
        ),
        ('"no MD5 at all"', None, {"ChecksumCRC32": "?"}, None),
        (f'"{"a" * 32}"', None, {"ChecksumCRC64NVME": "AAAAAAAAAAA="}, "md5"),
    ],
)
def test_what_can_be_checked_depends_on_what_the_store_tells(etag, part, told, by):
    found = checksum_of(etag, 8, part, told)
    assert (found and found.algorithm) == by


def test_of_a_folder_come_the_parts_of_its_index_and_nothing_pickled():
    keys = [
        "m/sd/model_index.json",
        "m/sd/latent_rgb.json",
        "m/sd/transformer/config.json",
        "m/sd/transformer/diffusion_pytorch_model.safetensors",
        "m/sd/transformer/diffusion_pytorch_model.bin",
        "m/sd/vae/diffusion_pytorch_model.safetensors",
        "m/sd/loras/mossy.safetensors",
        "m/sd/sd3.5_large.safetensors",
        "m/sd/examples/picture.json",
        "m/sd/training.pt",
        "m/sd-other/transformer/config.json",
    ]
    found = chosen(Source("b", "m/sd"), [(key, 1, "e") for key in keys], INDEX)
    assert [file.path for file in found] == [
        "latent_rgb.json",
        "loras/mossy.safetensors",
        "model_index.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_of_a_file_comes_that_file():
    source = source_of("s3://bucket/checkpoints/sd3.5_large.safetensors")
    keys = [source.prefix, f"{source.prefix}.json", "checkpoints/other.safetensors"]
    (file,) = chosen(source, [(key, 1, "e") for key in keys], None)
    assert (file.path, file.key) == ("sd3.5_large.safetensors", source.prefix)


@pytest.mark.parametrize("path", ["../x.json", "transformer/../../x.json", "transformer//x.json"])
def test_no_key_leads_out_of_the_folder(path: str):
    with pytest.raises(ConfigurationError) as refused:
        chosen(Source("bucket", "m"), [(f"m/{path}", 1, "e")], INDEX)
    assert refused.value.field == "model.path"
    assert refused.value.value == f"m/{path}"


@pytest.mark.parametrize(
    "path",
    ["s3://", "s3://ab", "s3:///x", "s3://bucket/a/../b", "s3://bucket/a//b", "s3://buck et/a"],
)
def test_an_address_that_names_nothing_is_refused(path: str):
    with pytest.raises(ConfigurationError) as refused:
        source_of(path)
    assert refused.value.value == path


@pytest.mark.parametrize("data", [b"[]", b"{", b"\xff", b"[" * 100_000])
def test_an_index_that_is_no_object_is_refused(data: bytes):
    with pytest.raises(ConfigurationError, match="model_index.json"):
        index_in(data, Source("bucket", "m"))


def test_what_is_not_there_is_named():
    assert not_there(Source("bucket", "a/b.safetensors")).value == "s3://bucket/a/b.safetensors"
    assert str(source_of("s3://bucket/")) == "s3://bucket"
    assert source_of("s3://bucket").name == "bucket"
