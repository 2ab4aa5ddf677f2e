import sys
from pathlib import Path

from tests.rehearsal.walk import walk

if __name__ == "__main__":
    failed, _ = walk(Path(sys.argv[1]).resolve(), "".join(sys.argv[2:3]))
    sys.exit(bool(failed))
