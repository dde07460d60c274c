"""What is read ahead on another thread arrives whole, in order, and what fails there is told."""

from collections.abc import Iterator

import pytest
import torch

from deployments.sd3.upload import Upload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]

CARD = torch.device("cuda")


def drawn(*sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (size,), generator=generator).to(torch.uint8) for size in sizes]


def test_tensors_of_every_size_arrive_as_they_were():
    hosts = drawn(1, 0, (32 << 20) - 1, 32 << 20, (96 << 20) + 5, 7, 64 << 20)
    with Upload(CARD, hosts) as upload:
        there = [upload(host) for host in hosts]
    for host, here in zip(hosts, there, strict=True):
        assert torch.equal(here.cpu(), host)


def test_what_was_there_is_overwritten_only_in_its_turn():
    """Memory of a tensor that is gone is used again while a kernel may still read it."""
    hosts = drawn(*[8 << 20] * 64)
    sums = []
    with Upload(CARD, hosts) as upload:
        for host in hosts:
            sums.append(upload(host).sum(dtype=torch.int64))
    assert [int(each) for each in sums] == [int(host.sum(dtype=torch.int64)) for host in hosts]


def test_what_taking_a_tensor_raises_is_raised_where_it_is_uploaded():
    def coming() -> Iterator[torch.Tensor]:
        yield from drawn(5)
        raise OSError("the disk is gone")

    with Upload(CARD, coming()) as upload:
        upload(torch.empty(5, dtype=torch.uint8))
        with pytest.raises(OSError, match="gone"):
            upload(torch.empty(5, dtype=torch.uint8))


def test_more_than_was_to_come_is_an_error_and_less_is_none():
    with Upload(CARD, drawn(5)) as upload:
        upload(torch.empty(5, dtype=torch.uint8))
        with pytest.raises(LookupError):
            upload(torch.empty(5, dtype=torch.uint8))
    with Upload(CARD, drawn(*[40 << 20] * 8)) as upload:
        upload(torch.empty(40 << 20, dtype=torch.uint8))
