"""The environment of the tests: signals that a parent ignored, plugins that are installed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import signals_are_heard

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_that_were_ignored_are_heard_here_and_end_what_tests_start(name):
    number = signal.Signals[name]
    before = signal.signal(number, signal.SIG_IGN)
    try:
        line = ["sh", "-c", f"kill -{name[3:]} $$; echo went on"]
        ignoring = subprocess.run(line, capture_output=True)
        assert (ignoring.returncode, ignoring.stdout) == (0, b"went on\n")
        signals_are_heard()
        assert callable(signal.getsignal(number))
        assert subprocess.run(line, capture_output=True).returncode == -number
    finally:
        signal.signal(number, before)


def test_interrupts_that_were_not_ignored_stay_as_they_are():
    before = signal.getsignal(signal.SIGINT)
    signals_are_heard()
    assert signal.getsignal(signal.SIGINT) is before is signal.default_int_handler


@pytest.mark.slow
def test_other_plugins_that_warn_are_not_loaded(tmp_path):
    info = tmp_path / "noisy-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: noisy\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[pytest11]\nnoisy = noisy\n")
    (tmp_path / "noisy.py").write_text(
        "import warnings\ndef pytest_configure(config):\n    warnings.warn('noise')\n"
    )
    (tmp_path / "test_one.py").write_text("def test_one():\n    pass\n")
    line = [sys.executable, "-m", "pytest", "-q", "-c", str(PROJECT), "--rootdir", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTEST_ADDOPTS": ""}
    for options, code in (([], 0), (["-n", "1"], 0), (["-p", "noisy"], 3)):
        done = subprocess.run(
            [*line, *options, str(tmp_path)], env=environment, cwd=tmp_path, capture_output=True
        )
        assert done.returncode == code, done.stdout + done.stderr
