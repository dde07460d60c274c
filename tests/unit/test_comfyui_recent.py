"""What pictures of late prompts carry is kept within bounds, by tenant."""

from __future__ import annotations

from serve.http.comfyui_recent import RecentTexts
from serve.http.comfyui_record import ChainRecord, PromptRecord


def _record(job: str, tenant: str = "a", text: str = "x") -> PromptRecord:
    chain = ChainRecord(job=job, sampler="5", encoder="2", decoder="6", outputs={"7": "p"})
    return PromptRecord(
        id=job,
        tenant=tenant,
        number=1,
        created_ms=1,
        digest="",
        prompt={"1": {"class_type": "SaveImage", "inputs": {"text": text}}},
        extra_data={},
        chains=(chain,),
        node_errors={},
        warnings=(),
    )


def test_texts_are_their_tenants_and_the_oldest_are_forgotten():
    recent = RecentTexts(most_characters=2000)
    first = _record("first")
    recent.keep(first)
    assert recent.find("a", "first") == first.png_text()
    assert recent.find("b", "first") is None
    for number in range(40):
        recent.keep(_record(f"job-{number}"))
    assert recent.find("a", "first") is None
    assert recent.find("a", "job-39") is not None


def test_what_is_forgotten_or_too_long_leaves_room_for_others():
    recent = RecentTexts(most_characters=2000)
    for number in range(100):
        recent.keep(_record("same", text=str(number)))
    recent.keep(_record("long", text="x" * 3000))
    assert recent.find("a", "long") is None
    recent.keep(_record("other"))
    assert recent.find("a", "other") is not None
