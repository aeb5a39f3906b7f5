"""Makes data/code: Python files of the installed packages that packages.txt names, as bytes, 40 MB at most."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root, from any working directory

from data import domains

if __name__ == "__main__":
    domains.prepare(__file__, domains.python_files, __doc__)
