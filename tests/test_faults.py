"""A short version of the campaign of faults.py."""

import subprocess
import sys

import pytest

from conftest import ROOT


@pytest.mark.parametrize("codebase", ["DeiT-with-iRPE", "DETR-with-iRPE"])
def test_killed_runs_end_as_others_and_damaged_files_are_refused_or_read(codebase):
    command = [sys.executable, "tests/faults.py", "--only", codebase, "--kills", "2", "--damaged", "6"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0 and done.stdout.endswith(f"{codebase}: 0 failures\n"), done.stdout + done.stderr
