"""What a door keeps with a job: it stands below the first line of the accepted job's record.

So it is written by the write that accepts the job, is there whenever the job is, and goes with it;
a door that answers for more than a request needs no record beside the journal's. Only its door
reads what it says.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Attachment:
    """To be kept with a job.

    Attributes:
        data: Not empty.
        is_listed: Whether the job is one that its door lists: then it stands in a list apart, and
            in `Pipeline.jobs` all the same.
    """

    data: bytes
    is_listed: bool = True


def with_attachment(record: bytes, attachment: Attachment | None) -> bytes:
    """Return a record of one line as it is written, with what is attached to it."""
    return record if attachment is None else b"\n".join((record, attachment.data))


def without_attachment(written: bytes) -> bytes:
    """Return the record alone."""
    return written.partition(b"\n")[0]


def attached(written: bytes) -> bytes | None:
    """Return what is attached to a record; None: nothing."""
    return written.partition(b"\n")[2] or None
