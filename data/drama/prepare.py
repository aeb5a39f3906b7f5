"""Makes data/drama: Shakespeare's 38 plays as bytes, 4.8 MB, whole plays in train, val and a sealed test split."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root, from any working directory

from data import domains

if __name__ == "__main__":
    domains.prepare(__file__, domains.plays, __doc__)
