"""The decoding benchmark measures what it says, on a tiny VAE."""

import json

import pytest

from loadtest import decode_bench
from loadtest.results import Results


def test_the_bench_decodes_each_size_in_tiles_and_whole(tmp_path):
    arguments = "--tiny --sizes 128 64 --tiling always --repeats 1 --device cpu"
    options = decode_bench.parse_arguments(arguments.split())
    results = Results({}, tmp_path / "report.json", to_stdout=False)
    with results:
        decode_bench.measure(options, results)
    assert results.out is not None
    report = json.loads(results.out.read_text())
    assert report["complete"] is True
    assert report["served"].keys() == report["whole"].keys() == {"64", "128"}
    assert all(served["tile"] == 512 for served in report["served"].values())
    assert all(whole["tile"] is None for whole in report["whole"].values())
    assert 0 < report["served"]["128"]["planned_gib"] <= 3
    assert decode_bench.targets_of(report)["128/difference"]["met"] is True


def test_a_peak_above_the_promise_is_not_met():
    served = {"2048": {"peak_gib": 3.2, "planned_gib": 2.9}}
    targets = decode_bench.targets_of({"served": served})
    assert [target["met"] for target in targets.values()] == [False, False]


@pytest.mark.parametrize("wrong", ["--sizes 7", "--memory-gib 0", "--repeats 0"])
def test_arguments_are_checked(wrong):
    with pytest.raises(SystemExit):
        decode_bench.parse_arguments(wrong.split())
