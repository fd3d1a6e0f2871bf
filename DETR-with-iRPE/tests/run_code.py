"""Run Python code given as the first argument, for launchers that want a file; the rest are its arguments."""

import sys
from pathlib import Path

here = Path(__file__).parent
sys.path[:0] = [str(here), str(here.parent), str(here.parent / "demo")]
code = sys.argv.pop(1)
exec(code)
