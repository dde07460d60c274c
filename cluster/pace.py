"""How much longer than stages tell a request really takes, learnt from those that ended.

Stages tell of their work. They do not tell of what lies between them: calls, the journal, a machine
that does other things too, batches that do several pieces at once. Three things are learnt:

- The pace of a request that waits for nobody: what it took over what its own work takes.
- The pace of the queue: how long the service takes for a second of the work that is ahead. It is
  seen while there is a queue, from one request to the next, long before the request at its end is
  done: an overload that slows the service down shows within seconds.
- How far these were off for requests that ended, of which the 95th percentile is planned for. That
  is what split conformal prediction does (Papadopoulos et al., ECML 2002), over a window.

Pure: whoever calls says what time it is.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from cluster.completion import Completion

_MEAN_OF = 10
# Looked at: so long, at most and at least, while so many requests like this one are ahead. With
# fewer, what is seen is how seldom requests come.
_WINDOW_S = 3.0
_SHORTEST_S = 0.5
_QUEUE_OF = 3.0
_WEIGHT_S = 1.0
_FORGETS_S = 10.0
# What waits may be slowed down by what comes later: refusing takes a processor too, and ten times
# too many requests halved what two cores did. A queue half as long keeps them as busy.
_QUEUE_MARGIN = 2.0
# As long as nothing was learnt, and at least, so much longer is planned for.
_FIRST_MARGIN = 1.5
_LEAST_MARGIN = 1.2
_MOST_MARGIN = 2.5  # what took longer than that was a machine that stood still
_REMEMBERED = 64
_PLANNED_FOR = 0.95
_LEAST_PACE, _MOST_PACE = 0.02, 50.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """When a request will be done, in seconds from now.

    Attributes:
        completion: As stages tell.
        expected_s: As likely earlier as later.
        at_most_s: Hardly ever later.
        is_learnt: From requests before; without, it is no more than what stages tell.
        faster: Seconds by which `at_most_s` falls in a second, as what is ahead gets done.
        pace: Seconds that a second of work in the queue takes.
    """

    completion: Completion
    expected_s: float
    at_most_s: float
    is_learnt: bool = True
    faster: float = 1.0
    pace: float = 1.0

    def wait_s(self, deadline_s: float) -> float:
        """Return after how long it would hardly ever be later than a deadline."""
        return max(self.at_most_s - deadline_s, 0.0) / self.faster

    @property
    def busy_s(self) -> float:
        """Seconds that it will keep the service busy."""
        return self.pace * self.completion.own_s


class Pace:
    """What is learnt of one model's requests in one process; not thread-safe."""

    def __init__(self) -> None:
        self._alone = 1.0
        self._seen_alone = 0
        self._queue: float | None = None
        self._usual: float | None = None  # the same, of more than just now
        self._looked_at = float("-inf")
        self._margins: deque[float] = deque(maxlen=_REMEMBERED)
        self._come_s = 0.0  # work accepted, ever
        self._done: deque[tuple[float, float]] = deque()  # when, and how much work was done by then

    @property
    def queue(self) -> float:
        """Seconds that a second of work ahead takes."""
        return self._alone if self._queue is None else self._queue

    @property
    def margin(self) -> float:
        """What is planned for, over what is expected."""
        if not self._margins:
            return _FIRST_MARGIN
        ranked = sorted(self._margins)
        learnt = ranked[min(int(_PLANNED_FOR * len(ranked)), len(ranked) - 1)]
        # With few of them, the first guess still counts.
        known = len(ranked) / _REMEMBERED
        blended = known * learnt + (1 - known) * max(learnt, _FIRST_MARGIN)
        return min(max(_LEAST_MARGIN, blended), _MOST_MARGIN)

    def estimate(self, found: Completion, now: float) -> Estimate:
        """Return when a request will be done.

        Args:
            found: What stages tell.
            now: Seconds.
        """
        if found.behind_s >= _QUEUE_OF * found.alone_s:
            self._look(found.behind_s, now)
        else:
            self.disturbed()
        expected = self._alone * found.alone_s + self.queue * found.behind_s
        margin = self.margin
        queue_margin = max(margin, _QUEUE_MARGIN)
        planned = margin * self._alone * found.alone_s + queue_margin * self.queue * found.behind_s
        is_learnt = self._seen_alone > 0 or self._queue is not None
        return Estimate(found, expected, planned, is_learnt, queue_margin, self.queue)

    def accepted(self, found: Completion) -> None:
        """Note that a request is taken on."""
        self._come_s += found.own_s

    def dropped(self, work_s: float) -> None:
        """Note that work which was taken on will not be done; as `Completion.own_s`."""
        self._come_s -= work_s

    def disturbed(self) -> None:
        """Note that the queue is at its end, or that work came which nobody has measured."""
        self._done.clear()
        self._queue = self._usual  # how it was lately is not how the next one will be

    def ended(self, was: Estimate, took_s: float) -> None:
        """Note how long a request really took.

        Args:
            was: When it was taken on.
            took_s: From then to its end.
        """
        alone_s, behind_s = was.completion.alone_s, was.completion.behind_s
        if not 0 < alone_s < float("inf") or took_s <= 0:
            return
        if behind_s <= alone_s:
            ratio = (took_s - self.queue * behind_s) / alone_s
            if self._seen_alone:
                ratio = min(ratio, 2 * self._alone)
            self._seen_alone = min(self._seen_alone + 1, _MEAN_OF)
            self._alone += (_bounded(ratio) - self._alone) / self._seen_alone
        elif self._usual is not None:
            # Also where the queue is kept too short to be looked at, by what a bad moment taught.
            seen = _bounded((took_s - self._alone * alone_s) / behind_s)
            self._usual += (min(seen, 2 * self._usual) - self._usual) / _MEAN_OF
        if was.is_learnt and was.expected_s > 0:
            self._margins.append(took_s / was.expected_s)

    def _look(self, behind_s: float, now: float) -> None:
        """See how fast the queue gets shorter, but for what has come."""
        done = self._done
        done.append((now, self._come_s - behind_s))
        while now - done[0][0] > _WINDOW_S and now - done[1][0] >= _SHORTEST_S:
            done.popleft()
        (since, before), (_, after) = done[0], done[-1]
        if now - since < _SHORTEST_S:
            return
        # What was seen before counts as much as a second: a moment's standstill is none.
        usual = self._alone if self._usual is None else self._usual
        done_s = max(after - before, 0.0) + _WEIGHT_S / usual
        self._queue = _bounded((now - since + _WEIGHT_S) / done_s)
        forgotten = min((now - self._looked_at) / _FORGETS_S, 1.0)
        self._usual = usual + forgotten * (self._queue - usual)
        self._looked_at = now


def _bounded(pace: float) -> float:
    return min(max(pace, _LEAST_PACE), _MOST_PACE)
