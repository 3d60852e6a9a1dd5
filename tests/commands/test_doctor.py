"""`kexue doctor`: every diagnostic that applies, findings by severity, exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from kexue.commands.doctor import diagnose

PROGRAM = """
import torch
from torch import nn


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.rnn = nn.RNN(8, 8, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, tokens):
        return self.head(self.rnn(self.embed(tokens))[0])


def build():
    torch.manual_seed(0)
    model = Reader()
    nn.init.zeros_(model.rnn.weight_hh_l0)
    model.rnn.weight_hh_l0.data += 0.01 * torch.eye(8)
    tokens = torch.randint(10, (4, 30))
    return model, tokens, lambda logits: logits.square().mean()


def exploding():
    model, tokens, loss = build()
    model.head.weight.data *= 1e6
    return model, (tokens,), loss


def healthy():
    torch.manual_seed(0)
    layers = [nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)]
    for layer in layers[::2]:
        nn.init.orthogonal_(layer.weight)
    return nn.Sequential(*layers), torch.randn(8, 16), lambda y: 1 + y.square().mean()


def alone():
    return nn.Linear(3, 3)


not_callable = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mynet.py").write_text(PROGRAM)
    return tmp_path


def kexue(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "KEXUE_CHECK_SHAPES"}
    return subprocess.run(
        [sys.executable, "-m", "kexue", "doctor", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_findings_come_by_severity_with_advice(folder: Path) -> None:
    done = kexue(folder, "mynet:exploding")
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    severities = [line.split()[0] for line in lines[:-1:2]]
    order = ["error", "warning", "note"]
    assert severities == sorted(severities, key=order.index)
    assert severities[0] == "error"
    assert any(line.startswith("error") and "head" in line for line in lines)
    assert all(line.startswith(" " * 9) for line in lines[1:-1:2])
    assert "signal, step, gradient through time of rnn" in lines[-1]


def test_gradient_that_dies_in_time_is_found(folder: Path) -> None:
    done = kexue(folder, "mynet:build")
    assert "rnn" in done.stdout
    assert "e-" in done.stdout


def test_healthy_network_exits_with_0(folder: Path) -> None:
    done = kexue(folder, "mynet:healthy", "--tables", "--optimizer", "sgd")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 findings (signal, step)" in done.stdout
    assert "module" in done.stdout
    assert "share" in done.stdout


def test_json_holds_everything(folder: Path) -> None:
    done = kexue(folder, "mynet:exploding", "--json")
    found = json.loads(done.stdout)
    assert found["findings"][0]["severity"] == "error"
    assert found["step"]["optimizer"] == "adam"
    assert len(found["signal"]["records"]) == 3
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("mynet", "expected MODULE:CALLABLE"),
        ("nonet:build", "no module 'nonet'"),
        ("mynet:nothing", "has no 'nothing'"),
        ("mynet:not_callable", "must be callable, got int"),
        ("mynet:alone", "must return (model, batch) or (model, batch, loss), got Linear"),
    ],
)
def test_wrong_sources_are_refused_in_a_sentence(folder: Path, source: str, message: str) -> None:
    done = kexue(folder, source)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_loss_is_found_in_the_output() -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(loss=self.linear(x).square().mean())

    x = torch.randn(4, 3)
    assert list(diagnose(WithLoss(), {"x": x})) == ["signal", "step"]
    assert list(diagnose(nn.Sequential(nn.Linear(3, 2)), x)) == ["signal"]
    single = diagnose(nn.Linear(3, 2), (x,), lambda y: y.square().mean())
    assert single["signal"].records[0].gradient_second_moment is not None


def test_nothing_of_the_model_changes() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, state = torch.randn(8, 3), torch.get_rng_state()
    diagnose(model, x, lambda y: y.square().mean())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
