"""Logs of training runs, condensed: the record of past runs is read long after their logs."""

import json
from pathlib import Path

from PIL import Image

import deployments.builtin
from deployments.builtin.training_curves import condense, main, plot, write_record
from deployments.builtin.training_log import TrainingLog

RECORD = Path(deployments.builtin.__file__).parent / "training_record" / "curves.json"


def test_a_condensed_log_keeps_the_curves_and_no_places(tmp_path: Path):
    log = TrainingLog(tmp_path / "log.jsonl")
    log.write("start", torch="2", device="x", options={"out": "/somewhere", "seed": "3"})
    for step, loss in ((1, 2.0), (60, 0.5)):
        log.write(
            "flow", step=step, loss=loss, norm=1.0, factor=0.5, ms_per_step=80.0, elapsed_s=1.0
        )
    log.write("adherence", weights="trained", step=60, core={"all": 0.25}, hard={"all": 0.0})
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    run = condense([json.loads(line) for line in lines])
    write_record({"one": run}, tmp_path / "curves.json")
    assert json.loads((tmp_path / "curves.json").read_text()) == {"one": run}
    loss_column = run["flow"]["columns"].index("loss")
    assert [row[loss_column] for row in run["flow"]["rows"]] == [2.0, 0.5]
    assert run["options"] == {"seed": "3"}
    assert [event["event"] for event in run["events"]] == ["adherence"]
    plot({"one": run}, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert len(picture.getcolors() or ()) > 3


def test_a_run_is_added_to_a_record_that_is_there(tmp_path: Path):
    log = TrainingLog(tmp_path / "log.jsonl")
    log.write("start", torch="2", device="x", options={"seed": "4"})
    log.write("flow", step=1, loss=1.0, norm=1.0, factor=0.5, ms_per_step=80.0, elapsed_s=1.0)
    for name in ("run a", "run b"):
        main(["--out", str(tmp_path / "record"), f"{name}={tmp_path / 'log.jsonl'}"])
    assert [*json.loads((tmp_path / "record" / "curves.json").read_text())] == ["run a", "run b"]


def test_the_kept_record_has_every_run_with_its_curve_and_options():
    runs = json.loads(RECORD.read_text(encoding="utf-8"))
    for run in runs.values():
        rows = run["flow"]["rows"]
        assert all(len(row) == len(run["flow"]["columns"]) for row in rows)
        assert rows[-1][2] < rows[0][2]
        assert run["options"]["seed"]
    for name in ("run 2", "run 3"):
        assert any(event["event"] == "adherence" for event in runs[name]["events"])
