"""
The cheap contracts over the covering array (covering.py): every pair of values that GPTConfig accepts meets in a row.
"""

import covering
import pytest

# these tests, with the flags below
from test_contracts import (  # noqa: F401
    case,
    test_a_bfloat16_step,
    test_causal,
    test_comes_back,
    test_drop_in,
    test_eval_loss_is_the_language_model_loss_alone,
    test_gradients_reach_every_parameter,
    test_logits_do_not_depend_on_targets,
    test_order_matters,
    test_prefix_consistent,
    test_rows_are_independent,
)

pytestmark = pytest.mark.slow
ROWS = covering.table()


def pytest_generate_tests(metafunc):
    if "flags" in metafunc.fixturenames:
        metafunc.parametrize("flags", ROWS, ids=range(len(ROWS)))


def test_every_pair_occurs():
    missing = covering.coverable()
    for row in ROWS:
        assert covering.fitted(row) == row
        at = covering.levels_of(row)
        missing[at[:, None], at] = False
    assert not missing.any(), "a new flag or value: python tests/contracts/covering.py makes the table again"


def test_every_flag_is_in_the_array():
    """By a value of its own here, or by a row of the smoke test."""
    assert covering.DEFAULTS.keys() - covering.SIZE.keys() - set(covering.CELL_SIZES) == covering.VALUES.keys()
