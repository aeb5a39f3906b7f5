"""Everything that measures: comparisons (ablate), speed and memory (bench), pictures. `python -m lab.NAME --help`."""
