"""Jobs under constant load while something random is killed: each must end once, as undisturbed.

`python -m loadtest.chaos --jobs 300 --json` starts Kelvin with pico on this machine, on a head and
two further nodes and on a store of its own. It keeps some jobs under way and kills, with SIGKILL
and at random moments, replicas of every stage, Pipelines, Serve's controller, its proxy, raylets
and the head node, which is started again; and takes the store away for seconds. Then it compares
every job with an undisturbed run, and the journal with what clients were told.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from loadtest.chaos_victims import KINDS
from loadtest.results import STDERR
from serve.commands.output import stdout_is_for_json, write_json
from serve.commands.stopping import stoppable
from serve.environment import exported


def main() -> int:
    """Run chaos; exit 1 if anything was lost, doubled or changed."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m loadtest.chaos")
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--at-once", type=int, default=8, help="jobs under way at a time")
    parser.add_argument("--rounds", type=int, default=2, help="times that each kind is hurt")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what is hurt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-s", type=float, default=1500.0, help="then it is given up")
    parser.add_argument("--plot", type=Path, help="PNG of the timeline")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    if min(options.jobs, options.at_once, options.rounds) < 1 or not options.limit_s > 0:
        parser.error("--jobs, --at-once, --rounds and --limit-s are above 0")
    # Read when Ray is imported: its own handler of SIGTERM would abort, and leave nodes behind.
    with exported({"RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1"}):
        from loadtest.chaos_run import attackable, chaos
    with stdout_is_for_json() as stdout, stoppable():
        with (
            tempfile.TemporaryDirectory(prefix="kelvin-chaos-") as folder,
            attackable(Path(folder)) as target,
        ):
            found = chaos(
                target,
                options.jobs,
                at_once=options.at_once,
                rounds=options.rounds,
                kinds=tuple(options.kinds),
                seed=options.seed,
                limit_s=options.limit_s,
                plot=options.plot,
            )
        STDERR.print_json(data=found)
        if options.json:
            write_json(found, stdout)
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
