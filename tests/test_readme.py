"""The READMEs agree with released.json and with the code, and what they tell the reader to run works."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import reproduce
import torch

from conftest import PATIENCE, ROOT

RELEASED = json.loads((ROOT / "tools" / "released.json").read_text(encoding="utf-8"))
ROWS = reproduce.read_table(ROOT / "tools" / "released.json")
FOLDERS = ("*.md", "docs/*.md", "benchmarks/**/*.md", "rpe_ops/*.md", "D*-with-iRPE/*.md")
MARKDOWN = [path for folder in FOLDERS for path in sorted(ROOT.glob(folder))]
CODEBASES = ("DeiT-with-iRPE", "DETR-with-iRPE")


def load(path):
    spec = importlib.util.spec_from_file_location(path.parent.name.replace("-", "_").strip(".") + path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


README = load(ROOT / ".ci" / "readme.py")


@pytest.mark.parametrize("name", README.TABLES)
def test_each_table_shows_released_json_and_changes_with_it(name):
    table = README.TABLES[name]
    text = table.readme.read_text(encoding="utf-8")
    assert README.rewrite(text, name, RELEASED) == text, "run python .ci/readme.py"
    score, title = {"deit": ("top1", "top-1"), "detr": ("ap", "AP")}[table.codebase]
    rows = RELEASED[table.codebase]
    (cell,) = (cell for column, cell in table.columns.items() if column.split(" ")[0] == title)
    changed = README.rewrite(text, name, {table.codebase: [{**row, score: 0.125} for row in rows]})
    assert changed.count(f"| {cell.format(**{score: 0.125})} |") == len(rows)


@pytest.mark.parametrize("name", README.TABLES)
def test_each_table_links_the_checkpoint_and_the_authors_log_beside_it(name):
    table = README.TABLES[name]
    text = table.readme.read_text(encoding="utf-8")
    for row in RELEASED[table.codebase]:
        folder, file = row["url"].rsplit("/", 1)
        log = f"{folder}/log_{file.replace('.pth', '.txt')}"
        assert text.count(f"[checkpoint]({row['url']}), [log]({log})") == 1


def test_the_code_knows_the_released_names_files_and_urls():
    models = load(ROOT / "DeiT-with-iRPE" / "hubconf.py")._rpe_models
    assert [row["name"] for row in RELEASED["deit"]] == list(models.RELEASED)
    for row in RELEASED["deit"]:
        assert row["file"] == f"{row['name']}.pth" and row["url"] == models.RELEASE_URL + row["file"]
        assert models.default_cfgs[row["name"]].default.url == row["url"]


def test_detrs_rows_are_entries_of_its_hubconf_and_fetch_their_url(monkeypatch):
    hubconf = load(ROOT / "DETR-with-iRPE" / "hubconf.py")
    asked = []
    monkeypatch.setattr(hubconf, "_build", lambda flags, url, *rest: asked.append(([*flags], url)) or (None, {}))
    for row in RELEASED["detr"]:
        entry = getattr(hubconf, row["name"])
        entry(pretrained=True)
        assert asked[-1] == (["--enc_rpe2d", row["enc_rpe2d"]], row["url"])
        (ap,) = re.findall(r"([\d.]+) AP", entry.__doc__)
        assert float(ap) == pytest.approx(100 * row["ap"])
        assert f"{row['epochs']} epochs" in entry.__doc__ and f"{row['buckets']} buckets" in entry.__doc__
    assert len({row["url"] for row in ROWS}) == 9


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_parameters_macs_and_buckets_are_those_of_the_models(row):
    folder = reproduce.CODEBASES[row["codebase"]].folder
    model = torch.hub.load(str(folder), row["name"], source="local")
    buckets = {parameter.shape[-1] for name, parameter in model.named_parameters() if "rpe_k.lookup_table" in name}
    if row["codebase"] == "deit":
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == row["params_m"]
        assert buckets == {50}
    else:
        side, _ = map(int, row["buckets"].split("×"))
        assert buckets == {side * side}
        counted = reproduce.count(model.eval().requires_grad_(False).to("meta"), (800, 1088))
        assert (round(counted["params"] / 1e6, 2), round(counted["macs"] / 1e9, 1)) == README.DETR_SIZES[row["name"]]


def test_every_test_that_the_list_of_bug_reports_names_exists():
    text = (ROOT / "docs" / "bug_reports.md").read_text(encoding="utf-8")
    sources = {"DeiT": "DeiT-with-iRPE", "DETR": "DETR-with-iRPE"}
    named, path = 0, None
    for line in text.splitlines():
        cell = re.search(r"\| (DeiT|DETR) (`test_[^|]*) \|$", line)
        for file, name in re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)`", cell[2] if cell else ""):
            path = ROOT / sources[cell[1]] / "tests" / file if file else path
            assert f"def {name}(" in path.read_text(encoding="utf-8"), f"{path.name}::{name}"
            named += 1
    assert named > 20


def code_blocks(text, language):
    """The contents of a text's code blocks in this language; "" is none."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_the_readmes_example_runs_in_another_folder_and_prints_what_the_text_says(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (shell,), (code,), (output,) = (code_blocks(text, language) for language in ("bash", "python", "text"))
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env.update(IRPE=str(ROOT), OMP_NUM_THREADS="1")
    subprocess.run(["bash", "-ec", shell], cwd=tmp_path, env=env, check=True)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        env=env,
        text=True,
        capture_output=True,
        timeout=PATIENCE,
    )
    assert (done.stdout, done.returncode) == (output, 0), done.stderr


def documented_commands():
    """{codebase: [(program, flags)]} of the commands in Markdown code blocks that run a program of a codebase.

    A command in a codebase's README runs in that folder. Elsewhere the last `cd` before it names the folder.
    """
    found = {codebase: [] for codebase in CODEBASES}
    for path in MARKDOWN:
        folder = path.parent.name
        for line in "".join(code_blocks(path.read_text(encoding="utf-8"), "")).splitlines():
            if match := re.fullmatch(r"cd (DeiT-with-iRPE|DETR-with-iRPE)", line):
                folder = match[1]
            program = re.search(r"(?:^|\s)(main|run_with_submitit)\.py (.*)", line)
            if program and folder in found and "..." not in line:
                found[folder].append((program[1], shlex.split(program[2], comments=True)))
    return found


@pytest.mark.parametrize("codebase", CODEBASES)
def test_every_documented_command_has_only_flags_that_its_program_accepts(codebase):
    commands = documented_commands()[codebase]
    assert len(commands) > 6 and {program for program, _ in commands} == {"main", "run_with_submitit"}
    code = f"""
import argparse, main, run_with_submitit
for program, flags in {commands!r}:
    parents = [main.get_args_parser() if program == "main" else run_with_submitit.get_parser()]
    argparse.ArgumentParser(parents=parents, allow_abbrev=False, conflict_handler="resolve").parse_args(flags)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT / codebase,
        text=True,
        capture_output=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr


def anchor(title):
    """The name that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading(path):
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        file, _, heading = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
        assert not heading or heading in map(anchor, titles), link
