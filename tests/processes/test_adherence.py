"""The built-in model draws what core prompts ask for, as a caller sees it: over HTTP and S3.

The prompts are the core ones of `held_out_prompts(67, 1, 256, 256)`, taken as they came; each
states a combination that training never saw.
"""

import json
import subprocess
import sys

import pytest

from deployments.builtin.held_out import states_held_out
from deployments.builtin.world import read_claims
from loadtest.trials import holds
from tests.processes.adherence_run import PROMPTS

LEAST_RIGHT = 35  # of 40: 88 %; 38 were right when the weights were new


def test_the_prompts_are_core_and_held_out():
    assert len(set(PROMPTS)) == 40
    for prompt in PROMPTS:
        claims = read_claims(prompt)
        assert states_held_out(claims)
        assert holds(claims) in ("one thing", "two things")


@pytest.mark.timeout(1200)
def test_seven_pictures_in_eight_show_all_that_was_asked(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.processes.adherence_run", str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=1100,
    )
    trials = json.loads(done.stdout.splitlines()[-1])
    assert len(trials) == 40
    for trial in trials:
        assert (trial["model"], trial["steps"]) == ("kelvin-builtin", 20)
        assert trial["size"] == [256, 256]
        assert trial["sha256_holds"]
    wrong = [trial for trial in trials if trial["wrong"]]
    assert len(trials) - len(wrong) >= LEAST_RIGHT, json.dumps(wrong, indent=1)
