"""Optimizer and random states as tensors and JSON, exact to the bit."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from lowrank_tune.errors import UserError


def flatten_optimizer(state: Mapping[str, Any], names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's `state_dict()` as tensors and a JSON document; `names[i]` is the name of its parameter i.

    Any nesting of tensors, numbers, strings, None, lists, tuples and dicts comes back as it was. Raises TypeError for
    other things.
    """
    tensors: dict[str, Tensor] = {}
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in state["param_groups"]]
    by_name = {names[index]: entry for index, entry in state["state"].items()}
    rest = {key: value for key, value in state.items() if key not in ("state", "param_groups")}
    return tensors, {
        "state": _pack(by_name, "", tensors),
        "groups": _pack(groups, "group", tensors),
        "rest": _pack(rest, "rest", tensors),
    }


def restore_optimizer(
    tensors: Mapping[str, Tensor],
    document: Mapping[str, Any],
    names: Sequence[str],
) -> dict[str, Any]:
    """The `state_dict` for an optimizer whose parameter i is `names[i]`, whatever order they had when it was saved.

    Raises `UserError` where the parameters are other ones, or stand in other groups.
    """
    index = {name: i for i, name in enumerate(names)}
    groups = _unpack(document["groups"], tensors)
    saved = {name for group in groups for name in group["params"]}
    if other := saved ^ set(names):
        raise UserError(
            f"the saved optimizer belongs to other parameters: {len(other)} differ, `{min(other)}` among them"
        )
    for group in groups:
        group["params"] = sorted(index[name] for name in group["params"])
    if [i for group in groups for i in group["params"]] != list(range(len(names))):
        raise UserError("the saved optimizer has its parameters in other groups")
    state = {index[name]: entry for name, entry in _unpack(document["state"], tensors).items()}
    return {**_unpack(document["rest"], tensors), "state": state, "param_groups": groups}


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"dict": [[key, _pack(entry, f"{path}/{key}".lstrip("/"), tensors)] for key, entry in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_pack(entry, f"{path}/{i}", tensors) for i, entry in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{path}: cannot save a {type(value).__name__}")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpack(entry, tensors) for key, entry in content}
    entries = [_unpack(entry, tensors) for entry in content]
    return tuple(entries) if kind == "tuple" else entries


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All global random states (python, numpy, torch, every CUDA device) as tensors and a JSON document."""
    state: Any = numpy.random.get_state(legacy=False)
    keys = torch.from_numpy(state["state"]["key"].astype(numpy.int64))
    tensors = {"torch": torch.get_rng_state(), "numpy": keys}
    if torch.cuda.is_available():
        tensors |= {f"cuda/{i}": device for i, device in enumerate(torch.cuda.get_rng_state_all())}
    numpy_rest = [state["bit_generator"], int(state["state"]["pos"]), int(state["has_gauss"]), float(state["gauss"])]
    return tensors, {"python": random.getstate(), "numpy": numpy_rest}


def restore_rng(tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
    """Sets what `rng_state` gave. States of CUDA devices that are not here are left out."""
    version, words, gauss = document["python"]
    random.setstate((version, tuple(words), gauss))
    name, position, has_gauss, cached = document["numpy"]
    numpy.random.set_state((name, tensors["numpy"].numpy().astype(numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda/{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda/{i}"], i)
