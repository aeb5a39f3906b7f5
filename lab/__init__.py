"""Everything that measures: comparisons (ablate), speed and memory (bench), pictures. `python -m lab.NAME --help`."""

import signal
import sys

if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while PyTorch is imported: no traceback
