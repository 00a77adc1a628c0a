"""Fixtures of several test files."""

import math
import os
import signal
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # each process of pytest -n has one core, and its children
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import torch
from helpers import AuthorsNet, run
from torch import nn

import data
import eval as evaluation
import models


@pytest.fixture(scope="session")
def authors_net() -> AuthorsNet:
    """With random weights that keep the signal's size through 101 layers. Copy to change it."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        net = AuthorsNet()
        for m in net.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, std=math.sqrt(1.5 / m.weight[0].numel()))
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(0, 0.1)
                m.running_var.uniform_(0.7, 1.4)
                nn.init.uniform_(m.weight, 0.5, 1)
                nn.init.normal_(m.bias, 0, 0.1)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def authors_snapshot(authors_net, tmp_path_factory) -> Path:
    """A file as the authors publish it: layer5 and layer6 are the heads."""
    path = tmp_path_factory.mktemp("weights") / "GTA5_100000.pth"
    torch.save(authors_net.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def r101() -> models.Generator:
    """To be loaded into, by one test after another."""
    return models.Generator("r101")


@pytest.fixture(scope="session")
def r101_torchvision() -> models.Generator:
    return models.Generator("r101", lineage="torchvision")


@pytest.fixture
def few(monkeypatch):
    """Streets of a few scenes, no pictures, and signal handlers given back."""
    for key, (first, _) in data.STREETS.items():
        monkeypatch.setitem(data.STREETS, key, (first, 6))
    monkeypatch.setattr(evaluation, "draw", lambda *arguments, **options: evaluation.Figure())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def scenes(monkeypatch):
    """Streets of a few scenes, for runs within this process."""
    for key, (first, _) in data.STREETS.items():
        monkeypatch.setitem(data.STREETS, key, (first, 6))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run, to be looked at and copied, not changed."""
    with pytest.MonkeyPatch.context() as patch:
        for key, (first, _) in data.STREETS.items():
            patch.setitem(data.STREETS, key, (first, 6))
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        out = run(tmp_path_factory.mktemp("finished") / "run")
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return out
