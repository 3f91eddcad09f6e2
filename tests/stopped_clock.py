"""A day that all clocks show from which a date in a prompt could come: transformers' and the package's."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from lowrank_tune.assembly import run_date
from lowrank_tune.data.templates import date as template_date


def stop_clock(monkeypatch: pytest.MonkeyPatch, day: str) -> None:
    """Stops them at noon."""
    noon = datetime.datetime.fromisoformat(f"{day}T12:00")

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return noon

    class Today(datetime.date):
        @classmethod
        def today(cls) -> Any:
            return noon.date()

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    monkeypatch.setattr(template_date, "date", Today)
    monkeypatch.setattr(run_date, "date", Today)
