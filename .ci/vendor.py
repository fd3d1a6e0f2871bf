"""Copy the files that both codebases share from DeiT-with-iRPE to DETR-with-iRPE.

    python .ci/vendor.py            copy, and print which files changed
    python .ci/vendor.py --check    copy nothing, and fail if a copy differs

Each codebase runs from its own folder without the other one, so it has its own copy. Edit the file in DeiT-with-iRPE,
then run `make vendor`.
"""

import argparse
import filecmp
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# file or folder in DeiT-with-iRPE → its copy in DETR-with-iRPE
VENDORED = {
    "irpe.py": "models/rpe_attention/irpe.py",
    "images.py": "util/images.py",
    "runtime": "util/runtime",
    "codebase_import.py": "codebase_import.py",
    "run_with_submitit.py": "run_with_submitit.py",
    "tests/fill.py": "tests/fill.py",
}


def vendored_files(root: Path) -> list[tuple[Path, Path]]:
    """(original, copy) of every vendored file below ``root``, with the Python files of vendored folders."""
    pairs = []
    for original, copy in VENDORED.items():
        source = root / "DeiT-with-iRPE" / original
        target = root / "DETR-with-iRPE" / copy
        if source.is_dir():
            pairs += [(file, target / file.relative_to(source)) for file in sorted(source.rglob("*.py"))]
        else:
            pairs.append((source, target))
    return pairs


def differing(root: Path) -> list[tuple[Path, Path]]:
    """(original, copy) of every vendored file below ``root`` whose copy is missing or differs."""
    return [
        (original, copy)
        for original, copy in vendored_files(root)
        if not copy.exists() or not filecmp.cmp(original, copy, False)
    ]


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Copy or check; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="copy nothing, and fail if a copy differs")
    check_only = parser.parse_args(argv).check
    pairs = differing(root)
    for original, copy in pairs:
        name = copy.relative_to(root)
        if check_only:
            print(f"{name} differs from {original.relative_to(root)}: edit the latter and run `make vendor`")
        else:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(original, copy)
            print(f"copied {original.relative_to(root)} to {name}")
    return int(check_only and bool(pairs))


if __name__ == "__main__":
    sys.exit(main())
