"""Where Triton is missing, one line says what to do."""

import sys

import pytest

from configurator import ConfigError
from kernels import triton_module


@pytest.mark.parametrize("name", ["block_sparse_triton", "fhn_triton", "scan_triton", "linear_attention_triton"])
def test_without_triton_the_line_says_what_to_do(name, monkeypatch):
    for module in [m for m in sys.modules if m == "triton" or m.startswith("triton.") or m.endswith("_triton")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ConfigError, match="--device=cpu"):
        triton_module(name)
