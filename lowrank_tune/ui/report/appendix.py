"""The last sections of a page: recipe, environment and notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from lowrank_tune.json_files import get_mapping
from lowrank_tune.ui.html import render
from lowrank_tune.ui.report.run_log import RunLog

BASE_FIELDS = ("revision", "bits")


def appendix(run_log: RunLog) -> Markup:
    """Returns the complete recipe, the machine with its versions and the hash of the frozen base, and the notes."""
    base = {name: run_log.base[name] for name in BASE_FIELDS if run_log.base.get(name) is not None}
    roles = _roles(run_log.started.roles) if run_log.started else ""
    return render(
        "appendix",
        run=run_log,
        roles=roles,
        base=base,
        hashes=get_mapping(run_log.summary, "base_hash"),
    )


def _roles(roles: Mapping[str, Sequence[str]]) -> str:
    described = []
    for role, adapters in roles.items():
        stack = " + ".join(map(str, adapters))
        described.append(f"{role}: {stack or 'the base'}")
    return ", ".join(described)
