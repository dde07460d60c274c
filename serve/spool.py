"""Finished pictures on local disk: they wait there for a store that does not answer.

    {folder}/{job id}/{index}-{digest}.picture    the file as it will be stored
    {folder}/{job id}/{index}.json                what is known of it, written last
    {folder}/lock                                 held while a picture is written

The folder outlives its process: whoever takes the job over on this machine finds the picture. What
is damaged or half written counts as not there. All methods block.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from serve.config import Settings
from serve.errors import ConfigurationError
from serve.job_ids import checked, is_job_id
from serve.requests import ImageRef, StageReport

_MIB = 1 << 20
_LOCK = "lock"


class MadePicture(BaseModel):
    """A finished picture, but for the address at which callers get it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ref: ImageRef
    reports: tuple[StageReport, ...]
    joules: float | None


@dataclass(frozen=True)
class Spooled:
    """A picture that lies in the spool."""

    made: MadePicture
    file: Path
    note: Path

    def read(self) -> bytes | None:
        """Return the picture's bytes; None if they are gone or damaged."""
        try:
            data = self.file.read_bytes()
        except OSError:
            return None
        return data if hashlib.sha256(data).hexdigest() == self.made.ref.sha256 else None

    def remove(self) -> None:
        """Remove the picture; none is no error."""
        for remove in (self.note.unlink, self.file.unlink, self.file.parent.rmdir):
            # Not there; or other pictures of the job are.
            with suppress(OSError):
                remove()


class Spool:
    """A folder of finished pictures, shared by the Pipelines of one service on one machine.

    Args:
        folder: Made when the first picture comes.
        most_bytes: That pictures may take up.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder = folder
        self.most_bytes = most_bytes

    def used_bytes(self) -> int:
        """Return how much waits."""
        total = 0
        for job in self._jobs():
            try:
                total += sum(entry.stat().st_size for entry in os.scandir(job))
            except OSError:
                continue  # removed meanwhile
        return total

    def jobs(self, older_than_s: float = 0.0) -> list[str]:
        """Return the ids of jobs of which a picture waits, the first for so long."""
        before = time.time() - older_than_s
        return [
            job.name for job in self._jobs() if is_job_id(job.name) and _changed_at(job) <= before
        ]

    def write(self, job_id: str, made: MadePicture, data: bytes) -> Spooled | None:
        """Write a picture down; None if it does not fit, or the disk refuses it."""
        # One by one, or all that are finished at a time would find the same room, here and in other
        # Pipelines on this machine.
        try:
            self._make_folder()
            with (self.folder / _LOCK).open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if self.used_bytes() + len(data) > self.most_bytes:
                    return None
                return self._written(job_id, made, data)
        except (OSError, ConfigurationError):
            return None

    def _written(self, job_id: str, made: MadePicture, data: bytes) -> Spooled | None:
        spooled = self._place(job_id, made)
        try:
            spooled.file.parent.mkdir(mode=0o700, exist_ok=True)
            _write_whole(spooled.file, data)
            _write_whole(spooled.note, made.model_dump_json().encode())
        except OSError:
            spooled.remove()
            return None
        return spooled

    def find(self, job_id: str, index: int) -> Spooled | None:
        """Return a job's picture if it lies here, whole."""
        note = self.folder / checked(job_id) / f"{index}.json"
        try:
            self._check_owner()
            made = MadePicture.model_validate_json(note.read_bytes())
        except (OSError, ValidationError, ConfigurationError):
            return None
        spooled = self._place(job_id, made)
        if spooled.note != note:
            return None
        if spooled.read() is None:
            spooled.remove()  # it is made again, and may go straight to the store
            return None
        return spooled

    def remove_job(self, job_id: str) -> None:
        """Remove every picture of a job."""
        shutil.rmtree(self.folder / checked(job_id), ignore_errors=True)

    def _place(self, job_id: str, made: MadePicture) -> Spooled:
        folder = self.folder / checked(job_id)
        index = made.ref.index
        digest = hashlib.sha256(made.ref.sha256.encode()).hexdigest()[:16]
        return Spooled(made, folder / f"{index}-{digest}.picture", folder / f"{index}.json")

    def _jobs(self) -> list[Path]:
        try:
            self._check_owner()
            return [Path(entry.path) for entry in os.scandir(self.folder) if entry.is_dir()]
        except (OSError, ConfigurationError):
            return []

    def _make_folder(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._check_owner()

    def _check_owner(self) -> None:
        for folder in (self.folder, self.folder.parent):
            # Its default lies where everybody may write: nobody may have made it for us.
            if folder.stat().st_uid not in (os.getuid(), 0) or folder.is_symlink():
                raise ConfigurationError(
                    "The spool's folder belongs to somebody else.",
                    field="spool.directory",
                    value=str(folder),
                    allowed="a folder of this user's own",
                )


def spool_of(settings: Settings) -> Spool | None:
    """Return the spool that these settings mean; None: there is none.

    Services that share a machine and a directory do not meet: each store has a folder of its own.
    """
    if settings.spool.mib == 0:
        return None
    base = settings.spool.directory or f"/var/tmp/kelvin-spool-{os.getuid()}"
    # By pictures and journal: whose jobs have ended is asked of the journal.
    stores = (settings.storage, settings.journal.storage or settings.storage)
    place = " ".join(f"{each.endpoint_url} {each.bucket} {each.prefix}" for each in stores)
    folder = Path(base) / hashlib.sha256(place.encode()).hexdigest()[:16]
    return Spool(folder, settings.spool.mib * _MIB)


def _changed_at(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return time.time()  # removed meanwhile


def _write_whole(file: Path, data: bytes) -> None:
    """Write a file so that after a crash it is there whole or not at all."""
    half = file.with_suffix(f".{os.getpid()}.half")
    with half.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    half.replace(file)
