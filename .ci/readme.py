"""Write the tables of released models into the READMEs, from tools/released.json.

    python .ci/readme.py

A table stands between `<!-- released NAME -->` and `<!-- end -->`, where NAME is a key of `TABLES`.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Parameters in millions, and MACs in billions for an image of 800×1088 pixels. The authors' tables do not list them for
# DETR, so they are counted with tools/reproduce.py. tests/test_readme.py checks them against the models.
DETR_SIZES = {
    "detr_resnet50_rpe_19_product_ctx_1_k": (41.53, 82.2),
    "detr_resnet50_rpe_20_product_ctx_1_k": (41.54, 82.3),
    "detr_resnet50_rpe_20_product_ctx_1_k_300epochs": (41.54, 82.3),
}


@dataclass(frozen=True)
class Table:
    """A table of released models in a README."""

    readme: Path
    codebase: str  # "deit" or "detr", the key in released.json
    columns: dict[str, str]  # title of a column → format of a row's cell


DOWNLOADS = "[checkpoint]({url}), [log]({log})"
TABLES = {
    "deit": Table(
        ROOT / "DeiT-with-iRPE" / "README.md",
        "deit",
        {
            "name": "`{name}`",
            "parameters (M)": "{params_m:.2f}",
            "MACs (M)": "{macs_m}",
            "top-1": "{top1:.1f}",
            "top-5": "{top5:.1f}",
            "download": DOWNLOADS,
        },
    ),
    "detr": Table(
        ROOT / "DETR-with-iRPE" / "README.md",
        "detr",
        {
            "`--enc_rpe2d`": "`{enc_rpe2d}`",
            "buckets": "{buckets}",
            "epochs": "{epochs}",
            "parameters (M)": "{params_m:.2f}",
            "MACs (G)": "{macs_g:.1f}",
            "AP": "{ap:.3f}",
            "AP50": "{ap50:.3f}",
            "AP75": "{ap75:.3f}",
            "APS": "{aps:.3f}",
            "APM": "{apm:.3f}",
            "APL": "{apl:.3f}",
            "download": DOWNLOADS,
        },
    ),
    "deit summary": Table(
        ROOT / "README.md",
        "deit",
        {
            "ImageNet-1K": "DeiT-{size}",
            "iRPE on": "{where}",
            "parameters (M)": "{params_m:.2f}",
            "MACs (M)": "{macs_m}",
            "top-1 (%)": "{top1:.1f}",
            "top-5 (%)": "{top5:.1f}",
            "download": DOWNLOADS,
        },
    ),
    "detr summary": Table(
        ROOT / "README.md",
        "detr",
        {
            "COCO val2017": "DETR-R50",
            "iRPE on": "keys, {buckets} buckets",
            "epochs": "{epochs}",
            "parameters (M)": "{params_m:.2f}",
            "AP": "{ap:.3f}",
            "AP50": "{ap50:.3f}",
            "AP75": "{ap75:.3f}",
            "download": DOWNLOADS,
        },
    ),
}
SIZES = {"tiny": "Ti", "small": "S", "base": "B"}
PLACES = {"k": "keys", "qk": "queries, keys", "qkv": "queries, keys, values"}


def describe(row: dict[str, Any]) -> dict[str, Any]:
    """A row of released.json with what the tables show besides: the log's URL, the size, and where the encoding is."""
    release, _, file = row["url"].rpartition("/")
    described = {**row, "log": f"{release}/log_{file.removesuffix('.pth')}.txt"}
    if match := re.fullmatch(r"deit_([a-z]+)_.*_([qkv]+)", row["name"]):
        described.update(size=SIZES[match[1]], where=PLACES[match[2]])
    else:
        described["params_m"], described["macs_g"] = DETR_SIZES[row["name"]]
    return described


def markdown(columns: dict[str, str], rows: list[dict[str, Any]]) -> str:
    """Lines of a Markdown table."""
    cells = [list(columns), ["---"] * len(columns)]
    cells += [[text.format(**describe(row)) for text in columns.values()] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def rewrite(text: str, name: str, released: dict[str, list[dict[str, Any]]]) -> str:
    """The ``text`` of a README with a new version of its table ``name``."""
    table = TABLES[name]
    start = f"<!-- released {name} -->"
    written = f"{start}\n{markdown(table.columns, released[table.codebase])}<!-- end -->"
    text, count = re.subn(f"{re.escape(start)}.*?<!-- end -->", lambda _: written, text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{table.readme} contains `{start}` ... `<!-- end -->` {count} times; it must be once")
    return text


def main() -> None:
    """Rewrite all tables."""
    released = json.loads((ROOT / "tools" / "released.json").read_text(encoding="utf-8"))
    for name, table in TABLES.items():
        text = table.readme.read_text(encoding="utf-8")
        table.readme.write_text(rewrite(text, name, released), encoding="utf-8")


if __name__ == "__main__":
    main()
