"""What a Pipeline holds, as gauges: its jobs, its lease, and pictures that wait for the store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sized

from cluster.complaints import Complaints
from serve.custody import Custody
from serve.detached import detached_context
from serve.metrics import Metrics
from serve.uploads import Uploads

_log = logging.getLogger("ray.serve")
_EVERY_S = 5.0


class PipelineGauges:
    """Sets them every five seconds, once started.

    Args:
        metrics: Of this process.
        live: The jobs here.
        custody: Of the lease.
        uploads: Of pictures.
    """

    def __init__(self, metrics: Metrics, live: Sized, custody: Custody, uploads: Uploads) -> None:
        self._metrics = metrics
        self._live = live
        self._custody = custody
        self._uploads = uploads
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; calling it again does nothing."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(
                self._run(), name="gauges", context=detached_context()
            )

    async def _run(self) -> None:
        complaints = Complaints(_log)
        while True:
            try:
                self._metrics.jobs_running(len(self._live), holds_lease=self._custody.is_held)
                spool = await self._uploads.as_json()
                self._metrics.spool(
                    spool["used_bytes"], spool["limit_bytes"], spool["waiting_pictures"]
                )
            except OSError as error:
                complaints.about(error, "the spool cannot be looked at")
            await asyncio.sleep(_EVERY_S)
