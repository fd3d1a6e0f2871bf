"""Lint, then the tests of every part in a process of its own (the two codebases have modules of the same names), two at
a time, as most tests use one core.

The last line sums them up: `N passed, N failed, N skipped`.
"""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# the longest first, and last what takes a minute or less, so that none waits long for another
PARTS = [
    *((ROOT / folder, "tests") for folder in ("DeiT-with-iRPE", ".", "DETR-with-iRPE")),
    *((ROOT / "rpe_ops", f"tests/{path.name}") for path in sorted(ROOT.glob("rpe_ops/tests/test_*.py"))),
]


def run_part(folder, tests):
    """(passed, failed, skipped) of these tests, run from their folder; a crash counts as one failure."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.xml")
        run = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-rs",
                "--durations=5",
                f"--junit-xml={report}",
                "-p",
                "no:cacheprovider",
                tests,
            ],
            cwd=folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        print(f"\n=== {folder.relative_to(ROOT.parent)}/{tests}\n{run.stdout}", flush=True)
        suites = ElementTree.parse(report).getroot().iter("testsuite") if report.exists() else ()
        counts = [{key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")} for suite in suites]
    total, skipped = (sum(count[key] for count in counts) for key in ("tests", "skipped"))
    failed = sum(count["failures"] + count["errors"] for count in counts)
    if run.returncode and not failed:
        failed, total = 1, total + 1
    return total - failed - skipped, failed, skipped


def main():
    ruff = [sys.executable, "-m", "ruff"]
    checks = [["check", "--no-cache", "."], ["format", "--no-cache", "--check", "."]]
    unclean = any([subprocess.run([*ruff, *check], cwd=ROOT).returncode for check in checks])
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run_part, *zip(*PARTS, strict=True)))
    passed, failed, skipped = (sum(column) for column in zip(*results, strict=True))
    failed += unclean
    print(f"\n{passed} passed, {failed} failed, {skipped} skipped")
    sys.exit(failed > 0 or passed == 0)


if __name__ == "__main__":
    main()
