"""
No row changes by accident: state-dict keys, their shapes and order, the order of the parameters (the optimiser's state
is numbered by it), and the loss and gradient norm of one seeded training step are those of record.json.

    PYTHONPATH=.:tests python tests/contracts/test_record.py  # write the record again, after a change that was meant

Computed in float64, so that the numbers are the same on every CPU, up to the order of sums.
"""

import json
from pathlib import Path

import pytest
import torch

from helpers import every_row
from smoke_test import VARIANTS, build

RECORD = Path(__file__).with_name("record.json")


def recorded(name):
    """What the record says of a row: structure, and numbers before one optimiser step, and the loss after it."""
    model, idx = build(VARIANTS[name])
    found = {
        "state": {key: [str(t.dtype).removeprefix("torch."), *t.shape] for key, t in model.state_dict().items()},
        "parameters": [key for key, _ in model.named_parameters()],
    }
    model = model.double()
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
    loss = model(idx[:, :-1], idx[:, 1:])[1]
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.step()
    numbers = {"loss": loss.item(), "grad_norm": norm.item(), "after": model(idx[:, :-1], idx[:, 1:])[1].item()}
    return found | {"numbers": numbers}


def read():
    return json.loads(RECORD.read_text(encoding="utf-8"))


@every_row
def test_row_is_as_recorded(name):
    was = read().get(name)
    if was is None:
        pytest.skip("a new row: `make tables` records it")
    now = recorded(name)
    assert list(now["state"].items()) == list(was["state"].items())  # the order too
    assert now["parameters"] == was["parameters"]
    now, was = now["numbers"], was["numbers"]
    # AdamW's first step is the gradient's sign, which rounding decides where parts of a row stay in float32
    assert now.pop("after") == pytest.approx(was.pop("after"), rel=1e-4)
    assert now == pytest.approx(was, rel=1e-6)


def test_the_record_has_no_other_rows():
    assert read().keys() == VARIANTS.keys()


if __name__ == "__main__":
    rows = {name: recorded(name) for name in VARIANTS}
    lines = (f"{json.dumps(name)}: {json.dumps(row, separators=(',', ':'))}" for name, row in rows.items())
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
