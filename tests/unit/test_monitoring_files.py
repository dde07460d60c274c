"""The shipped dashboard, alert rules and collector config: right in themselves.

That they name what a running Kelvin exports is seen in `tests/processes/test_tracing.py`. promtool,
of Debian's package prometheus, checks more where it is installed.
"""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter

import pytest
import yaml

from cluster.pool_gauges import POOL_METRICS
from serve.metric_table import METRICS
from tests.monitoring_files import FOLDER, dashboard, metric_names, queries, rules

_KNOWN = {**METRICS, **POOL_METRICS}
_OF_HISTOGRAMS = ("_bucket", "_sum", "_count")


def test_every_query_is_promql_on_metrics_of_the_tables() -> None:
    known = set()
    for name, spec in _KNOWN.items():
        ends = _OF_HISTOGRAMS if spec.kind == "histogram" else ("",)
        known |= {f"ray_{name}{end}" for end in ends}
    assert len(list(queries())) > 40
    assert metric_names() <= known


def test_every_metric_is_on_the_dashboard() -> None:
    shown = " ".join(
        target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])
    )
    assert not [name for name in _KNOWN if f"ray_{name}" not in shown]


def test_names_follow_the_conventions() -> None:
    assert len({spec.otel_name for spec in _KNOWN.values()}) == len(_KNOWN)
    for name, spec in _KNOWN.items():
        assert name.endswith("_total") == (spec.kind == "counter"), name
        assert bool(spec.buckets) == (spec.kind == "histogram"), name
        # A collector that puts the unit and _total behind OpenTelemetry's name gets this one.
        unit = {"s": "_seconds", "J": "_joules", "Cel": "_celsius", "W": "_watts"}
        unit |= {"By": "_bytes", "1": "_ratio"}
        again = spec.otel_name.replace(".", "_") + unit.get(spec.unit, "")
        assert again + ("_total" if spec.kind == "counter" else "") == name


def test_panels_do_not_overlap() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: Counter[tuple[int, int]] = Counter()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells.update(
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        )
    assert max(cells.values()) == 1


def test_every_alert_says_how_bad_it_is_and_has_a_test() -> None:
    tested = (FOLDER / "alerts.test.yaml").read_text()
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"].endswith(".")
        assert f"alertname: {rule['alert']}\n" in tested


def test_collector_config_uses_all_that_it_defines() -> None:
    config = yaml.safe_load((FOLDER / "otel-collector.yaml").read_text())
    for kind in ("receivers", "processors", "exporters"):
        used = {name for each in config["service"]["pipelines"].values() for name in each[kind]}
        assert used == set(config[kind])
    for pipeline in config["service"]["pipelines"].values():
        assert pipeline["processors"][0] == "memory_limiter"
        assert pipeline["processors"][-1] == "batch"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "--lint-fatal", "alerts.yaml"),
        ("test", "rules", "alerts.test.yaml"),
        ("check", "config", "--syntax-only", "prometheus.yaml"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_promtool(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["promtool", *arguments], cwd=FOLDER, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
