"""What `/history`, `/queue` and the websocket say of a prompt, from its record and its jobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve.http.comfyui_files import shown_images
from serve.http.comfyui_record import ChainRecord, PromptRecord
from serve.requests import GenerateResult, JobRecord

Jobs = Sequence[JobRecord | None]
"""Of a prompt's chains, in order; None: it has been deleted, or cannot be read."""


def are_over(jobs: Jobs) -> bool:
    """Return whether nothing can change what became of a prompt."""
    return all(job is None or job.is_over for job in jobs)


def are_waiting(jobs: Jobs) -> bool:
    """Return whether work on a prompt is known not to have begun; other processes' jobs may run."""
    return all(
        job is not None and job.progress is not None and job.progress.event == "queued"
        for job in jobs
    )


def outputs_of(
    record: PromptRecord, chain: ChainRecord, result: GenerateResult
) -> dict[str, dict[str, Any]]:
    """Return what a chain's output nodes have made: node id -> `{"images": [...]}`."""
    found: dict[str, dict[str, Any]] = {}
    for node, prefix in chain.outputs.items():
        if images := shown_images(result, record.class_type(node), prefix):
            found[node] = {"images": images}
    return found


def history_entry(record: PromptRecord, jobs: Jobs) -> dict[str, Any]:
    """Return a prompt's entry in `/history`; its jobs are over."""
    outputs: dict[str, Any] = {}
    ended_ms = record.created_ms
    for chain, job in zip(record.chains, jobs, strict=True):
        if job is not None and job.result is not None:
            outputs |= outputs_of(record, chain, job.result)
            ended_ms = max(ended_ms, record.created_ms + round(1000 * job.result.seconds))
    event, data = last_message(record, jobs)
    stamps = {"prompt_id": record.id, "timestamp": record.created_ms}
    succeeded = event == "execution_success"
    return {
        "prompt": record.queue_item(),
        "outputs": outputs,
        "status": {
            "status_str": "success" if succeeded else "error",
            "completed": succeeded,
            "messages": [
                ["execution_start", stamps],
                ["execution_cached", {"nodes": [], **stamps}],
                [event, {**data, "timestamp": ended_ms}],
            ],
        },
        "meta": {
            node: {
                "node_id": node,
                "display_node": node,
                "parent_node": None,
                "real_node_id": node,
            }
            for node in outputs
        },
        "warnings": warnings_of(record, jobs),
    }


def warnings_of(record: PromptRecord, jobs: Jobs) -> list[str]:
    """Return what was done otherwise than asked, of the workflow and of its pictures."""
    said = list(record.warnings)
    for job in jobs:
        if job is not None and job.result is not None:
            said += job.result.warnings
    return list(dict.fromkeys(said))


def last_message(record: PromptRecord, jobs: Jobs) -> tuple[str, dict[str, Any]]:
    """Return the message that ends a prompt: success, or the first chain's end that is none."""
    for chain, job in zip(record.chains, jobs, strict=True):
        if job is not None and job.status == "failed":
            return "execution_error", _failed(record, chain, job)
    for chain, job in zip(record.chains, jobs, strict=True):
        if job is None or job.status == "cancelled":
            return "execution_interrupted", _at(record, chain)
    return "execution_success", {"prompt_id": record.id}


def _failed(record: PromptRecord, chain: ChainRecord, job: JobRecord) -> dict[str, Any]:
    error = (job.error or {}).get("error") or {}
    field, allowed = error.get("field"), error.get("allowed")
    said = [str(error.get("message", "The job failed."))]
    if field is not None:
        said.append(f"{field}: {error.get('value')!r}.")
    if allowed is not None:
        said.append(f"Allowed: {allowed}.")
    return _at(record, chain) | {
        "exception_message": " ".join(said),
        "exception_type": str(error.get("type", "KelvinError")),
        "traceback": [],
        "current_inputs": {},
        "current_outputs": [],
    }


def _at(record: PromptRecord, chain: ChainRecord) -> dict[str, Any]:
    return {
        "prompt_id": record.id,
        "node_id": chain.sampler,
        "node_type": record.class_type(chain.sampler),
        "executed": [],
    }
