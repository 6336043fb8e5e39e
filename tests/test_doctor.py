"""`cerl doctor`: what it finds, and that every fault says what to do."""

import errno
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from cerl import __main__ as command
from cerl import doctor, self_test
from cerl.record import files, lock

ROOT = Path(__file__).resolve().parent.parent


def faults(findings):
    found = [finding for finding in findings if finding.state == "fault"]
    assert all(finding.advice for finding in found)
    return found


def test_extras_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert list(doctor.EXTRAS) == list(extras)
    for name, extra in doctor.EXTRAS.items():
        for package in extra.modules:
            assert any(line.startswith(package) for line in extras[name]), package


def test_this_machine_has_no_fault_and_the_run_is_equal_to_the_bit(tmp_path, capsys):
    assert command.main(["doctor", "--out", str(tmp_path / "runs")]) == 0
    said = capsys.readouterr()
    assert "stopped and resumed they are equal to the bit" in said.out
    assert "files can be locked" in said.out and "no faults" in said.err
    assert "\x1b" not in said.out  # no colours where the output is no terminal
    assert list(tmp_path.iterdir()) == []


def test_a_fault_has_exit_code_one(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert command.main(["doctor", "--quick", "--out", str(tmp_path / "file" / "runs")]) == 1
    said = capsys.readouterr()
    assert "1 fault, with what to do" in said.err and "--out FOLDER" in said.out


def test_an_extra_that_is_missing_is_no_fault_and_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(doctor, "there", lambda module: False)
    found = list(doctor.extras())
    assert {finding.state for finding in found} == {"option"}
    assert [finding.advice for finding in found] == [
        f"Install it: pip install 'cerl[{name}]'" for name in doctor.EXTRAS
    ]


def test_an_extra_that_is_installed_but_broken_is_a_fault(monkeypatch):
    monkeypatch.setattr(doctor, "there", lambda module: True)
    probe = "raise RuntimeError('no ROMs')"
    monkeypatch.setattr(doctor, "EXTRAS", {"atari": doctor.Extra("Atari", {"pip": "pip"}, probe)})
    (fault,) = faults(doctor.extras())
    assert "RuntimeError: no ROMs" in fault.text and "cerl[atari]" in fault.advice


def test_versions_that_do_not_fit_are_faults(monkeypatch):
    versions = {"torch": "2.9.1+cpu", "numpy": None, "gymnasium": "1.4", "triton": None}
    monkeypatch.setattr(doctor, "version_of", versions.get)
    monkeypatch.setattr(doctor, "_has_gpu", lambda: True)
    said = [fault.text for fault in faults(doctor.versions())]
    assert said[:2] == ["torch 2.9.1+cpu", "no triton, which compiles the kernels of a GPU"]
    assert said[2:] == ["no numpy"]
    monkeypatch.setattr(doctor, "version_of", (versions | {"torch": "2.11.0", "numpy": "2"}).get)
    monkeypatch.setattr(doctor, "_has_gpu", lambda: False)
    assert faults(doctor.versions()) == []


@pytest.mark.parametrize(("cuda", "words"), [(None, "is a build for CPUs"), ("13.0", "cannot use")])
def test_a_gpu_that_torch_cannot_use_is_a_fault(monkeypatch, cuda, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "driver_version", lambda: "570.1")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    (fault,) = faults(doctor.device())
    assert words in fault.text and "driver 570.1" in fault.text


def test_the_driver_is_read_from_proc(tmp_path):
    (tmp_path / "driver/nvidia").mkdir(parents=True)
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n"
    (tmp_path / "driver/nvidia/version").write_text(text)
    assert doctor.driver_version(tmp_path) == "580.95.05"


def test_a_folder_that_does_not_exist_is_not_made(tmp_path):
    assert faults(doctor.folder(tmp_path / "a" / "b")) == []
    assert list(tmp_path.iterdir()) == []


def test_a_small_disk_and_a_file_system_that_cannot_rename_are_faults(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "LEAST_DISK", 2**80)

    def refuse(path, text):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "write_text", refuse)
    disk, written = faults(doctor.folder(tmp_path))
    assert "of disk space free" in disk.text and "Input/output error" in written.text


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "works", lambda path: False)
    found = list(doctor.folder(tmp_path))
    assert found[-1].state == "option" and "cannot be locked" in found[-1].text


def test_a_run_that_resumes_differently_is_a_fault(monkeypatch):
    monkeypatch.setattr(self_test, "differences", lambda one, other: ["the parameters"])
    monkeypatch.setattr(doctor, "_has_gpu", lambda: False)
    (fault,) = faults(doctor.self_test())
    assert "wrong numbers" in fault.text and "the parameters" in fault.advice


def test_a_run_that_cannot_train_is_a_fault(monkeypatch):
    def fails(config):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(self_test.training, "train", fails)
    monkeypatch.setattr(doctor, "_has_gpu", lambda: False)
    (fault,) = faults(doctor.self_test())
    assert "No space left on device" in fault.text


def test_every_kind_of_difference_is_seen(tmp_path):
    config = self_test.tiny(tmp_path, device="cpu")
    one = self_test.training.train(config)
    same = self_test.training.train(config)
    other = self_test.training.train(config.model_copy(update={"seeds": (0, 2)}))
    assert self_test.differences(one, same) == []
    assert self_test.differences(one, other) == [
        "rows.parquet",
        "metrics.parquet",
        "the parameters",
    ]


def test_captured_updates_are_compared():
    assert "to the bit" in self_test.check_update("cpu")


@pytest.mark.slow
def test_the_kernel_is_compared_with_its_definition():
    """Here in Triton's interpreter, which has to be chosen before triton is imported."""
    pytest.importorskip("triton")
    code = "from cerl import self_test; print(self_test.check_attention('cpu'))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert "agrees with its definition" in done.stdout, done.stderr


@pytest.mark.gpu
def test_the_gpu_has_no_fault():
    assert faults(doctor.self_test()) == []
    assert "agrees with its definition" in self_test.check_attention("cuda")


def test_nothing_is_imported_that_help_need_not_wait_for():
    code = "import sys, cerl.doctor; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
