"""Copy the files that both codebases share from DeiT-with-iRPE to DETR-with-iRPE.

    python .ci/vendor.py            copy or delete, and print which files changed
    python .ci/vendor.py --check    change nothing, and fail if a copy differs

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


def left_over(root: Path) -> list[Path]:
    """Python files in the copy of a vendored folder whose original was deleted."""
    copies = {copy for _, copy in vendored_files(root)}
    folders = [
        root / "DETR-with-iRPE" / copy
        for original, copy in VENDORED.items()
        if (root / "DeiT-with-iRPE" / original).is_dir()
    ]
    return [path for folder in folders for path in sorted(folder.rglob("*.py")) if path not in copies]


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Copy or check; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, and fail if a copy differs")
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
    deleted = left_over(root)
    for path in deleted:
        name = path.relative_to(root)
        if check_only:
            print(f"{name} has no original in DeiT-with-iRPE: run `make vendor` to delete it")
        else:
            path.unlink()
            print(f"deleted {name}, whose original is gone")
    return int(check_only and bool(pairs or deleted))


if __name__ == "__main__":
    sys.exit(main())
