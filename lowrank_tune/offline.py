"""What to do about a model or a data set of the Hugging Face hub that is not on this machine."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Literal
from urllib.error import HTTPError
from urllib.request import Request, urlopen

VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Each of them forbids the Hugging Face libraries to use the network."""
HUB = "https://huggingface.co"
TRUE_VALUES = ("1", "on", "yes", "true")


def offline_variable(environ: Mapping[str, str] = os.environ) -> str:
    """Returns the name of the variable that forbids the network; empty if there is none."""
    return next((name for name in VARIABLES if environ.get(name, "").lower() in TRUE_VALUES), "")


def fetch_advice(
    name: str,
    revision: str = "",
    kind: Literal["model", "dataset"] = "model",
    environ: Mapping[str, str] = os.environ,
) -> str:
    """Returns why a repository was not fetched, and how to fetch it."""
    command = f"hf download {name}"
    if revision:
        command += f" --revision {revision}"
    if kind == "dataset":
        # the cache of the library datasets has rows in a form of its own, so a folder is named
        command += f" --repo-type dataset --local-dir {name.rpartition('/')[2]}"
    variable = offline_variable(environ)
    if not variable:
        return f"check the name and the network; `{command}` fetches it"
    return (
        f"{variable} is set, so nothing is fetched: check the name, and unset {variable}, or fetch it once with "
        f"`env -u {variable} {command}`"
    )


def hub_address(environ: Mapping[str, str] = os.environ) -> str:
    """Returns the address of the hub, or of the mirror that HF_ENDPOINT names."""
    return environ.get("HF_ENDPOINT") or HUB


def unreachable_reason(address: str, seconds: float) -> str:
    """Sends one request without content to an address. Returns why there was no answer within the time; empty if there
    was one, whatever it was."""
    reasons = [f"no answer within {seconds:g} s"]

    def request() -> None:
        try:
            with urlopen(Request(address, method="HEAD"), timeout=seconds):
                reasons[0] = ""
        except HTTPError:
            # an answer, too
            reasons[0] = ""
        except (OSError, ValueError) as error:
            reasons[0] = str(getattr(error, "reason", error))

    # the time limit of a connection does not include that of looking up its name
    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(seconds)
    return reasons[0]
