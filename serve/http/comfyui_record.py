"""What is written down of a ComfyUI prompt: its workflow, and which of Kelvin's jobs makes what."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from serve.attachment import Attachment

_LONGEST_KEYWORD = 79  # of a PNG's text chunk


class ChainRecord(BaseModel):
    """Which job makes the pictures of which nodes.

    Attributes:
        job: Its id; of the first chain's empty as long as it is not known.
        sampler: Id of the KSampler.
        encoder: Id of the node that encodes the prompt.
        decoder: Id of the node that decodes.
        outputs: Id of each output node -> prefix of its files' names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    job: str
    sampler: str
    encoder: str
    decoder: str
    outputs: dict[str, str]


class PromptRecord(BaseModel):
    """One prompt; its id is empty as long as its first chain's job, which makes it, has none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    tenant: str
    number: int | float
    created_ms: int
    digest: str
    prompt: dict[str, Any]
    extra_data: dict[str, Any]
    chains: tuple[ChainRecord, ...] = Field(min_length=1)
    node_errors: dict[str, Any]
    warnings: tuple[str, ...]

    @property
    def job(self) -> str:
        """Id of the job that it is attached to, or was handed on to."""
        return self.chains[0].job

    def made_by(self, jobs: Sequence[str]) -> PromptRecord:
        """Return it with the jobs of its chains."""
        chains = zip(self.chains, jobs, strict=True)
        made = tuple(chain.model_copy(update={"job": job}) for chain, job in chains)
        return self.model_copy(update={"chains": made})

    def held_by(self, job_id: str) -> PromptRecord:
        """Return it as it is once it is attached to its first chain's job."""
        made = self.made_by([job_id, *(chain.job for chain in self.chains[1:])])
        return made.model_copy(update={"id": self.id or drawn_id(job_id)})

    def led_by(self, job_id: str) -> PromptRecord:
        """Return it with the chain of this job before the others."""
        chains = sorted(self.chains, key=lambda chain: chain.job != job_id)
        return self.model_copy(update={"chains": tuple(chains)})

    def attachment(self) -> Attachment:
        """Return it as it is attached to the job of its first chain."""
        return Attachment(self.model_dump_json().encode())

    @property
    def client(self) -> str | None:
        """Who is sent its messages."""
        client = self.extra_data.get("client_id")
        return client if isinstance(client, str) else None

    def class_type(self, node: str) -> str:
        """Return the class of one of its nodes; empty: somebody has meddled with the record."""
        found = self.prompt.get(node)
        return str(found.get("class_type")) if isinstance(found, dict) else ""

    def png_text(self) -> dict[str, str]:
        """Return the text chunks that ComfyUI writes into a picture: nodes.py, SaveImage."""
        info = self.extra_data.get("extra_pnginfo")
        more = info if isinstance(info, dict) else {}
        texts = {name: value for name, value in more.items() if _is_keyword(name)}
        return {name: json.dumps(value) for name, value in {**texts, "prompt": self.prompt}.items()}

    def queue_item(self) -> list[Any]:
        """Return what `/queue` and `/history` show of it."""
        outputs = [output for chain in self.chains for output in chain.outputs]
        return [self.number, self.id, self.prompt, self.extra_data, outputs]

    def short_queue_item(self) -> list[Any]:
        """Return what `/queue` shows of it where those before it have filled the answer."""
        return [self.number, self.id, {}, {"create_time": self.created_ms}, []]


class OtherChain(BaseModel):
    """What is attached to the job of a chain that is not its prompt's first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt_id: str

    def attachment(self) -> Attachment:
        """Return it as it is attached; the job is not listed for a prompt."""
        return Attachment(self.model_dump_json().encode(), is_listed=False)


def drawn_id(job_id: str) -> str:
    """Return the prompt_id of a prompt that was sent without one, from the id of its job."""
    return str(uuid.UUID(hex=job_id))


def _is_keyword(name: str) -> bool:
    return 1 <= len(name) <= _LONGEST_KEYWORD and name.isascii() and name.isprintable()
