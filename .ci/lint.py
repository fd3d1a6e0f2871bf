"""Run ruff: its linter, its formatter, and type hints for the arguments of public functions.

python .ci/lint.py

Ruff's rule ANN001 also asks private helpers for type hints. This program runs it and keeps what it finds in public
functions: functions and methods without a leading underscore that are not in a private class or inside another
function.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUFF = [sys.executable, "-m", "ruff"]
_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def public_functions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The public functions of a module's or class's statements, and the public methods in their public classes."""
    for node in body:
        if isinstance(node, (*_FUNCTION, ast.ClassDef)) and not node.name.startswith("_"):
            if isinstance(node, ast.ClassDef):
                yield from public_functions(node.body)
            else:
                yield node


def argument_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[int]:
    """Numbers of the lines that the arguments of a function are on."""
    signature = function.args
    arguments = [*signature.posonlyargs, *signature.args, *signature.kwonlyargs]
    return {argument.lineno for argument in arguments}


def public_findings(findings: list[dict], sources: dict[str, str]) -> list[str]:
    """One line for each of ruff's findings that is about a public function; ``sources`` are files by their names."""
    lines = {
        name: set().union(*(argument_lines(function) for function in public_functions(ast.parse(source).body)), set())
        for name, source in sources.items()
    }
    return [
        f"{finding['filename']}:{finding['location']['row']}: {finding['code']} {finding['message']}"
        for finding in findings
        if finding["location"]["row"] in lines[finding["filename"]]
    ]


def missing_argument_types() -> list[str]:
    """Arguments of public functions that have no type hint, outside of tests."""
    command = [*RUFF, "check", "--no-cache", "--select", "ANN001", "--output-format", "json", "."]
    findings = json.loads(subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE).stdout)
    for finding in findings:
        finding["filename"] = str(Path(finding["filename"]).relative_to(ROOT))
    names = {finding["filename"] for finding in findings}
    return public_findings(findings, {name: (ROOT / name).read_text(encoding="utf-8") for name in names})


def main() -> int:
    """Run all checks; returns the exit status."""
    failed = subprocess.run([*RUFF, "check", "--no-cache", "."], cwd=ROOT).returncode != 0
    failed |= subprocess.run([*RUFF, "format", "--no-cache", "--check", "."], cwd=ROOT).returncode != 0
    missing = missing_argument_types()
    print("\n".join(missing) if missing else "All arguments of public functions have type hints.", flush=True)
    return int(failed or bool(missing))


if __name__ == "__main__":
    sys.exit(main())
