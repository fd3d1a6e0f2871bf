"""Run the linter, then all tests.

The two codebases have modules of the same names, so each part of the tests runs in a process of its own. Two parts run
at a time, because most tests use one core. The last line is `N passed, N failed, N skipped`.
"""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lint

ROOT = Path(__file__).resolve().parent.parent
# (folder, tests in it). The longest part comes first and the short ones last, so that both processes end together.
PARTS = [
    *((ROOT / folder, "tests") for folder in ("DeiT-with-iRPE", ".", "DETR-with-iRPE")),
    *((ROOT / "rpe_ops", f"tests/{path.name}") for path in sorted(ROOT.glob("rpe_ops/tests/test_*.py"))),
]


def run_part(folder: Path, tests: str) -> tuple[int, int, int]:
    """(passed, failed, skipped) of these tests, run from their folder; a crash counts as one failure."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.xml")
        options = ["-q", "-rs", "--durations=5", f"--junit-xml={report}", "-p", "no:cacheprovider"]
        run = subprocess.run(
            [sys.executable, "-m", "pytest", *options, tests],
            cwd=folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        print(f"\n=== {folder.relative_to(ROOT.parent)}/{tests}\n{run.stdout}", flush=True)
        suites = ElementTree.parse(report).getroot().iter("testsuite") if report.exists() else ()
        counts = [{key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")} for suite in suites]
    total = sum(count["tests"] for count in counts)
    skipped = sum(count["skipped"] for count in counts)
    failed = sum(count["failures"] + count["errors"] for count in counts)
    if run.returncode and not failed:
        failed, total = 1, total + 1
    return total - failed - skipped, failed, skipped


def main() -> None:
    """Exit with 1 if the linter finds something, a test fails, or no test passes."""
    unclean = lint.main()
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run_part, *zip(*PARTS, strict=True)))
    passed, failed, skipped = (sum(column) for column in zip(*results, strict=True))
    failed += unclean
    print(f"\n{passed} passed, {failed} failed, {skipped} skipped")
    sys.exit(failed > 0 or passed == 0)


if __name__ == "__main__":
    main()
