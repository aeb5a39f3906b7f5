"""Each hot loop as plain mathematics, as a CPU path and, where it pays, as Triton kernels for CUDA."""

import importlib

from configurator import ConfigError


def triton_module(name):
    """kernels/NAME.py, which imports Triton; ConfigError where that is not installed.

    Not imported elsewhere: Triton is published for Linux and takes long to import.
    """
    try:
        return importlib.import_module(f"kernels.{name}")
    except ModuleNotFoundError as e:
        if e.name != "triton":
            raise
        raise ConfigError("this variant's GPU kernels need Triton, which is not installed: train with --device=cpu, "
                          "or under Linux or WSL") from None  # fmt: skip
