"""kexue.nn.diagnosis: looking into a model without a trace, and saying what was found."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from kexue.nn.diagnosis import Diagnosis, Finding, observed, untouched


@dataclasses.dataclass(frozen=True)
class Norms(Diagnosis):
    norms: dict[str, float]
    tensor: torch.Tensor
    worst: Finding | None = None

    def rows(self):
        return [
            {"name": name, "norm": norm, "flags": ("a", "b")} for name, norm in self.norms.items()
        ]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))


def state(model: nn.Module) -> list[torch.Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def test_everything_is_put_back_bit_for_bit() -> None:
    model = network()
    model(torch.randn(8, 4)).sum().backward()
    before, random = state(model), torch.get_rng_state()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    with untouched(model):
        model(torch.randn(8, 4)).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        model[0].weight.grad = None
    assert all(map(torch.equal, state(model), before))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_a_model_without_gradients_has_none_afterwards() -> None:
    model = network()
    with untouched(model):
        model(torch.randn(8, 4)).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_everything_is_put_back_when_the_block_raises() -> None:
    model = network()
    before, random = state(model), torch.get_rng_state()

    def fail() -> None:
        with untouched(model):
            model(torch.randn(8, 4))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(map(torch.equal, state(model), before))
    assert torch.equal(torch.get_rng_state(), random)


def test_calls_of_leaves_are_seen_in_order_and_hooks_leave() -> None:
    model, seen = network(), []

    def see(name, module, inputs, output):
        seen.append((name, type(module).__name__, tuple(inputs[0].shape), tuple(output.shape)))

    with observed(model, see) as names:
        model(torch.randn(8, 4))
    assert names == ("0", "1", "2", "3")
    assert [entry[0] for entry in seen] == ["0", "1", "2", "3"]
    assert seen[0] == ("0", "Linear", (8, 4), (8, 3))
    model(torch.randn(8, 4))
    assert len(seen) == 4


def test_hooks_leave_when_the_model_raises() -> None:
    model, seen = network(), []
    with pytest.raises(RuntimeError), observed(model, lambda *call: seen.append(call)):
        model(torch.randn(8, 5))
    model(torch.randn(8, 4))
    assert seen == []


def test_selection_by_name_and_module() -> None:
    model = nn.Sequential(network(), nn.ReLU())
    with observed(model, print, include=lambda name, m: isinstance(m, nn.Sequential)) as names:
        pass
    assert names == ("0",)
    with (
        pytest.raises(ValueError, match="no module of Sequential"),
        observed(model, print, include=lambda name, m: False),
    ):
        pass


def test_findings_are_ordered_from_the_worst() -> None:
    findings = [Finding(s, "x", "m", "a") for s in ("note", "error", "warning")]
    assert [finding.severity for finding in sorted(findings)] == ["error", "warning", "note"]


@pytest.mark.bad_input
def test_unknown_severity_is_refused() -> None:
    with pytest.raises(ValueError, match="error, warning, note, got 'fatal'"):
        Finding("fatal", "x", "m", "a")


def test_result_prints_as_a_table_and_becomes_json() -> None:
    norms = Norms({"a": 0.123456, "long": math.inf}, torch.tensor([1.0, math.nan]))
    assert str(norms).splitlines() == [
        "name  norm    flags",
        "a     0.1235  a, b",
        "long  inf     a, b",
    ]
    worst = Finding("note", "x", "m", "a")
    plain = dataclasses.replace(norms, worst=worst).to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == {
        "norms": {"a": 0.123456, "long": "inf"},
        "tensor": [1.0, "nan"],
        "worst": {"severity": "note", "where": "x", "message": "m", "advice": "a"},
    }
    assert norms.findings() == ()
    assert Norms({}, torch.zeros(0)).table() == ""
    with pytest.raises(TypeError, match="Norms has no plot"):
        norms.plot()
