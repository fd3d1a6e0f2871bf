"""Run the linter, then all tests.

The two codebases have modules of the same names, so each part of the tests runs in a process of its own. Two parts run
at a time, because most tests use one core. At the end, it prints what failed and then the line
`N passed, N failed, N skipped`.
"""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import lint

ROOT = Path(__file__).resolve().parent.parent
# (folder, tests in it). The longest part comes first and the short ones last, so that both processes end together.
PARTS = [
    *((ROOT / folder, "tests") for folder in ("DeiT-with-iRPE", ".", "DETR-with-iRPE")),
    *((ROOT / "rpe_ops", f"tests/{path.name}") for path in sorted(ROOT.glob("rpe_ops/tests/test_*.py"))),
]


@dataclass
class Result:
    """What a part of the tests did: how many tests passed and were skipped, and one line for each failure."""

    passed: int
    skipped: int
    failures: list[str]


def read_report(report: Path) -> Result:
    """The result that pytest wrote to a JUnit file; a test that fails and then fails to clean up counts once."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    names = dict.fromkeys(f"{case.get('classname')}::{case.get('name')}" for case in failed)
    skipped = sum(case.find("skipped") is not None for case in cases)
    return Result(len(cases) - len(failed) - skipped, skipped, list(names))


def run_part(folder: Path, tests: str) -> Result:
    """Run these tests from their folder; a process that ends badly without a failed test counts as one failure."""
    part = f"{folder.relative_to(ROOT.parent)}/{tests}"
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
        print(f"\n=== {part}\n{run.stdout}", flush=True)
        result = read_report(report) if report.exists() else Result(0, 0, [])
    if run.returncode and not result.failures:
        result.failures.append(f"pytest exited with status {run.returncode}")
    result.failures = [f"{part}: {failure}" for failure in result.failures]
    return result


def main() -> None:
    """Exit with 1 if the linter finds something, a test fails, or no test passes."""
    unclean = lint.main()
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run_part, *zip(*PARTS, strict=True)))
    failures = ["the linter: its findings are at the start of this output"] if unclean else []
    failures += [failure for result in results for failure in result.failures]
    passed = sum(result.passed for result in results)
    skipped = sum(result.skipped for result in results)
    print("".join(f"\nFAILED {failure}" for failure in failures))
    print(f"{passed} passed, {len(failures)} failed, {skipped} skipped")
    sys.exit(bool(failures) or passed == 0)


if __name__ == "__main__":
    main()
