"""Run Python code given as the first argument, for launchers that want a file; the rest are its arguments."""
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
code = sys.argv.pop(1)
exec(code)
