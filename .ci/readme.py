"""Rewrite the codebases' model zoos, between `<!-- released -->` and `<!-- end -->`, from tools/released.json.

python .ci/readme.py
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READMES = {"deit": ROOT / "DeiT-with-iRPE" / "README.md", "detr": ROOT / "DETR-with-iRPE" / "README.md"}
# column → the row's entry under it, as a format
TABLES = {
    "deit": {
        "name": "{name}",
        "#Params (M)": "{params_m:.2f}",
        "MACs (M)": "{macs_m}",
        "top-1": "{top1:.1f}",
        "top-5": "{top5:.1f}",
        "file": "[.pth]({url})",
    },
    "detr": {
        "enc_rpe2d": "{enc_rpe2d}",
        "buckets": "{buckets}",
        "epochs": "{epochs}",
        "AP": "{ap:.3f}",
        "AP50": "{ap50:.3f}",
        "AP75": "{ap75:.3f}",
        "APS": "{aps:.3f}",
        "APM": "{apm:.3f}",
        "APL": "{apl:.3f}",
        "file": "[{file}]({url})",
    },
}


def table(columns, rows):
    """Lines of a Markdown table."""
    cells = [list(columns), ["---"] * len(columns)]
    cells += [[text.format(**row) for text in columns.values()] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def rewrite(text, name, released):
    """`text` of a codebase's README with its marked table made anew."""
    made = f"<!-- released -->\n{table(TABLES[name], released[name])}<!-- end -->"
    text, count = re.subn("<!-- released -->.*?<!-- end -->", lambda _: made, text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"the README of {name} has {count} times `<!-- released -->` ... `<!-- end -->`, not once")
    return text


def main():
    released = json.loads((ROOT / "tools" / "released.json").read_text(encoding="utf-8"))
    for name, path in READMES.items():
        path.write_text(rewrite(path.read_text(encoding="utf-8"), name, released), encoding="utf-8")


if __name__ == "__main__":
    main()
