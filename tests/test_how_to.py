"""Every block of HOW_TO_EQUIP_iRPE.md runs, in order, in a folder that contains only what the text says to copy."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from conftest import PATIENCE, ROOT

TEXT = (ROOT / "HOW_TO_EQUIP_iRPE.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
LACKING = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]


def steps():
    """(Python code, expected output) of every block; a shell block prints nothing."""
    found = []
    for language, content in BLOCKS:
        if language == "text":
            code, before = found.pop()
            assert not before, "one block has two outputs"
            found.append((code, content))
        elif language == "bash":
            found.append((f"import subprocess\nsubprocess.run(['bash', '-ec', {content!r}], check=True)\n", ""))
        else:
            assert language == "python", f"nothing runs a block of {language or 'no language'}"
            found.append((content, ""))
    return found


def test_every_block_runs_in_a_fresh_folder_and_prints_what_the_text_says(tmp_path):
    chosen = [(code, output) for code, output in steps() if not (LACKING and "onnx" in code)]
    mark = "\n--- end of block ---\n"
    script = "".join(f"{code}\nprint({mark!r}, end='', flush=True)\n" for code, _ in chosen)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        env={**env, "IRPE": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=PATIENCE,
    )
    printed = done.stdout.split(mark)
    for (code, output), said in zip(chosen, printed, strict=False):
        assert said == output, code + done.stderr[-2000:]
    assert done.returncode == 0 and len(printed) == len(chosen) + 1, done.stderr
    assert {path.name for path in tmp_path.glob("*.py")} == {"irpe.py", "rpe_vision_transformer.py"}
    if LACKING:
        pytest.skip(f"not installed: {', '.join(LACKING)} (requirements-export.txt); all blocks but ONNX's passed")


def test_the_shell_blocks_only_copy_from_the_folder_that_the_text_names():
    lines = [line for language, content in BLOCKS if language == "bash" for line in content.splitlines()]
    assert lines[0].startswith("export IRPE=") and len(lines) > 2
    assert all(re.fullmatch(r'cp "\$IRPE/[\w./-]+" \.', line) for line in lines[1:])
