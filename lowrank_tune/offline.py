"""What to do about a model or a data set of the Hugging Face hub that is not on this machine."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from http.client import HTTPException
from typing import Literal
from urllib.error import HTTPError
from urllib.request import Request, urlopen

VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Each of them forbids the Hugging Face libraries to use the network."""
HUB = "https://huggingface.co"
TRUE_VALUES = ("1", "on", "yes", "true")
CREDENTIALS = re.compile(r"^([a-z][a-z0-9+.-]*://)?[^/?#]*@", re.I)
"""Name and password before the host of an address; the group is what comes before them."""


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
    """Returns the address of the hub, or of the mirror that HF_ENDPOINT names, without name and password."""
    return CREDENTIALS.sub(r"\1", environ.get("HF_ENDPOINT") or HUB)


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
        except (OSError, ValueError, HTTPException) as error:
            reasons[0] = str(getattr(error, "reason", error)) or type(error).__name__

    # the time limit of a connection does not include that of looking up its name
    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(seconds)
    return reasons[0]
