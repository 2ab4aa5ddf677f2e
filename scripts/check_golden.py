"""Run golden cases through this project's public classes and compare with the stored numbers.

python scripts/check_golden.py DIR [DIR ...] [--only PREFIX] [--quiet]
"""

import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    folders = [str(Path(word).absolute()) if Path(word).exists() else word for word in sys.argv[1:]]
    raise SystemExit(subprocess.run([sys.executable, "-m", "tests.golden.check", *folders], cwd=root).returncode)
