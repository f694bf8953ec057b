"""`doctor` says what is there and what is missing, without asking the network."""

import importlib.metadata
import socket
from typing import Any

import pytest

from pathokd.cli.main import main
from pathokd.embed import doctor
from pathokd.errors import SlideError
from pathokd.models import card_names


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("doctor asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_a_healthy_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "A tiled TIFF is read by generic-tiff: 224 px at 0.5 um/px" in said
    assert "TROUBLE" not in said
    assert all(f"  {name}: " in said for name in card_names())
    assert "hoptimus0: 1,135 M parameters, Apache-2.0; not here" in said


def test_trouble_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise SlideError("no OpenSlide")

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "Slide", broken)
    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "TROUBLE: A tiled TIFF cannot be read: no OpenSlide" in said
    assert "TROUBLE: timm is not installed: pip install timm" in said


def test_offline_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.constants, "HF_HUB_OFFLINE", True)
    weights = [finding.text for finding in doctor.examine() if finding.topic == "weights"]
    assert all("HF_HUB_OFFLINE forbids fetching" in text or "local cache" in text for text in weights)
