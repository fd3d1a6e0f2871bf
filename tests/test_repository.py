"""The habits of the repository: vendored copies, type hints, dependencies and CI."""

import importlib.util
import re
import subprocess
import sys

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / ".ci"))
import lint
import vendor


def test_both_codebases_have_the_same_shared_files():
    assert vendor.differing(ROOT) == []
    assert vendor.main(["--check"]) == 0


@pytest.fixture
def copies(tmp_path):
    """A folder with both codebases, of which only the shared files exist."""
    for original, copy in vendor.vendored_files(ROOT):
        for path in (original, copy):
            path = tmp_path / path.relative_to(ROOT)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(original.name)
    return tmp_path


def test_vendor_names_and_copies_exactly_the_files_that_differ(copies, capsys):
    changed = copies / "DeiT-with-iRPE" / "irpe.py"
    copy = copies / "DETR-with-iRPE" / "models" / "rpe_attention" / "irpe.py"
    changed.write_text("new")
    assert vendor.main(["--check"], copies) == 1 and copy.read_text() == "irpe.py"
    assert "irpe.py differs from DeiT-with-iRPE/irpe.py" in capsys.readouterr().out
    assert vendor.main([], copies) == 0 and copy.read_text() == "new"
    assert capsys.readouterr().out.count("copied") == 1
    copy.unlink()
    assert vendor.main(["--check"], copies) == 1
    assert vendor.main([], copies) == 0 and copy.read_text() == "new"


def test_modules_of_a_shared_folder_are_copied_too(copies):
    new = copies / "DeiT-with-iRPE" / "runtime" / "new.py"
    new.write_text("new")
    assert vendor.main(["--check"], copies) == 1
    assert vendor.main([], copies) == 0
    assert (copies / "DETR-with-iRPE" / "util" / "runtime" / "new.py").read_text() == "new"


def test_copies_of_deleted_modules_are_found_and_deleted(copies, capsys):
    copy = copies / "DETR-with-iRPE" / "util" / "runtime" / "errors.py"
    (copies / "DeiT-with-iRPE" / "runtime" / "errors.py").unlink()
    assert vendor.main(["--check"], copies) == 1 and copy.exists()
    assert "errors.py has no original in DeiT-with-iRPE" in capsys.readouterr().out
    assert vendor.main([], copies) == 0 and not copy.exists()
    assert vendor.main(["--check"], copies) == 0


def test_types_are_asked_for_in_public_functions_and_public_methods_only():
    source = """
def public(untyped, typed: int) -> None:
    def nested(untyped): ...
def _private(untyped): ...
class Public:
    def method(self, untyped) -> None: ...
    def _private(self, untyped): ...
class _Private:
    def method(self, untyped) -> None: ...
"""
    command = [*lint.RUFF, "check", "--isolated", "--no-cache", "--select", "ANN001", "--output-format", "concise", "-"]
    output = subprocess.run(command, input=source, text=True, capture_output=True).stdout
    lines = [int(row) for row in re.findall(r"^-:(\d+):", output, re.MULTILINE)]
    assert len(lines) == 6  # ruff itself finds private functions too
    findings = [{"filename": "a.py", "location": {"row": row}, "code": "ANN001", "message": "untyped"} for row in lines]
    assert lint.public_findings(findings, {"a.py": source}) == ["a.py:2: ANN001 untyped", "a.py:6: ANN001 untyped"]


@pytest.mark.skipif(importlib.util.find_spec("tomllib") is None, reason="Python 3.10 has no tomllib")
def test_each_requirements_file_refers_to_an_extra_of_pyproject_and_dev_has_them_all():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    referred = set()
    for path in ROOT.glob("requirements*.txt"):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        assert len(lines) == 1 and re.fullmatch(r"\.(\[\w+\])?", lines[0]), path.name
        referred |= set(re.findall(r"\[(\w+)\]", lines[0]))
    assert referred == {"dev", "export", "slurm"} and referred | {"demo"} == set(extras)
    assert f"{project['name']}[demo,export,slurm]" in extras["dev"]


def test_ci_runs_the_developers_command():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert re.findall(r"^\s*- run: (.+)$", workflow, re.MULTILINE) == [".ci/run"]
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_list_of_failures_names_failed_tests_errors_of_fixtures_and_crashes(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("run_all_tests", ROOT / ".ci" / "test.py")
    run_all_tests = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = run_all_tests  # dataclasses look their module up there
    spec.loader.exec_module(run_all_tests)
    monkeypatch.setattr(run_all_tests, "ROOT", tmp_path)
    tmp_path.joinpath("test_some.py").write_text(
        "import pytest\n"
        "@pytest.fixture\n"
        "def unclean():\n    yield\n    assert False\n"
        "def test_good():\n    pass\n"
        "def test_bad():\n    assert False\n"
        "def test_bad_twice(unclean):\n    assert False\n"
        "def test_bad_end(unclean):\n    pass\n"
        "@pytest.mark.skip\ndef test_skipped():\n    pass\n"
    )
    result = run_all_tests.run_part(tmp_path, "test_some.py")
    part = f"{tmp_path.name}/test_some.py: test_some::test_"
    assert (result.passed, result.skipped) == (1, 1)
    assert result.failures == [f"{part}bad", f"{part}bad_twice", f"{part}bad_end"]

    tmp_path.joinpath("test_crash.py").write_text("import os\ndef test_crash():\n    os._exit(3)\n")
    result = run_all_tests.run_part(tmp_path, "test_crash.py")
    assert result.failures == [f"{tmp_path.name}/test_crash.py: pytest exited with status 3"]
