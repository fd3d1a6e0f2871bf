"""The READMEs' tables are released.json's, and released.json says what the code does."""

import importlib.util
import json
import re

import pytest
import reproduce
import torch

from conftest import ROOT

RELEASED = json.loads((ROOT / "tools" / "released.json").read_text(encoding="utf-8"))
ROWS = reproduce.read_table(ROOT / "tools" / "released.json")


def load(path):
    spec = importlib.util.spec_from_file_location(path.parent.name.replace("-", "_").strip(".") + path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ("deit", "detr"))
def test_each_model_zoo_is_that_of_released_json_and_changes_with_it(name):
    readme = load(ROOT / ".ci" / "readme.py")
    text = readme.READMES[name].read_text(encoding="utf-8")
    assert readme.rewrite(text, name, RELEASED) == text, "run python .ci/readme.py"
    score = {"deit": "top1", "detr": "ap"}[name]
    changed = {name: [{**row, score: 0.125} for row in RELEASED[name]]}
    made = readme.TABLES[name]["top-1" if name == "deit" else "AP"].format(**{score: 0.125})
    assert readme.rewrite(text, name, changed).count(f"| {made} |") == len(RELEASED[name])


def test_the_code_knows_the_released_names_files_and_urls():
    models = load(ROOT / "DeiT-with-iRPE" / "hubconf.py")._rpe_models
    assert [row["name"] for row in RELEASED["deit"]] == list(models.RELEASED)
    for row in RELEASED["deit"]:
        assert row["file"] == f"{row['name']}.pth" and row["url"] == models.RELEASES + row["file"]
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
