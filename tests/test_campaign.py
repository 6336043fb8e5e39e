"""A short fault campaign; `python tests/campaign.py --kills 1000` is a long one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_short_campaign_finds_nothing_lost_and_nothing_different():
    """In a process of its own, whose forks share none of this one's threads."""
    program = Path(__file__).with_name("campaign.py")
    command = [sys.executable, str(program), "--kills", "14", "--flips", "20"]
    command += ["--mutations", "10", "--disks", "2", "--seed", "7"]
    environment = {**os.environ, "PYTHONPATH": str(program.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    counts = {
        name: int(count.replace(",", ""))
        for count, _, name in (line.strip().partition(" ") for line in done.stdout.splitlines())
        if count.replace(",", "").isdecimal()
    }
    assert counts["kills"] == 14 and counts["flipped bits"] == 20
    assert counts["mutated checkpoints"] == 10 and counts["runs compared"] > 0
    assert counts["of them inside a write"] >= 14 // 4
