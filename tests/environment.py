"""What must be settled before the tests' other imports: conftest.py imports this first."""

import os
import tempfile

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network
# compiled code is made here and now: what another CPU, another worker or a killed run left is never loaded
COMPILED = os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="inductor-")
pytest.register_assert_rewrite("helpers", "jobs")
