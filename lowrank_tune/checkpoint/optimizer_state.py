"""Optimizer states as tensors and a JSON document, exact to the bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lowrank_tune.errors import UserError


def flatten_optimizer(state: Mapping[str, Any], names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns an optimizer's `state_dict()` as tensors and a JSON document; `names[i]` is the name of parameter i.

    `restore_optimizer` restores any nesting of tensors, numbers, strings, None, lists, tuples and dicts. Raises
    TypeError for other values.
    """
    tensors: dict[str, Tensor] = {}
    groups = []
    for group in state["param_groups"]:
        params = [names[index] for index in group["params"]]
        groups.append({**group, "params": params})
    by_name = {names[index]: entry for index, entry in state["state"].items()}
    rest = {key: value for key, value in state.items() if key not in ("state", "param_groups")}
    document = {
        "state": _pack(by_name, "", tensors),
        "groups": _pack(groups, "group", tensors),
        "rest": _pack(rest, "rest", tensors),
    }
    return tensors, document


def restore_optimizer(
    tensors: Mapping[str, Tensor],
    document: Mapping[str, Any],
    names: Sequence[str],
) -> dict[str, Any]:
    """Returns the `state_dict` for an optimizer whose parameter i is `names[i]`; the order in the saved state can
    differ.

    Raises `UserError` if the parameters differ or belong to other groups.
    """
    index = {name: i for i, name in enumerate(names)}
    groups = _unpack(document["groups"], tensors)
    saved = {name for group in groups for name in group["params"]}
    other = saved ^ set(names)
    if other:
        raise UserError(
            f"the saved optimizer belongs to other parameters: {len(other)} differ, `{min(other)}` among them"
        )
    order = []
    for group in groups:
        group["params"] = sorted(index[name] for name in group["params"])
        order += group["params"]
    if order != list(range(len(names))):
        raise UserError("the saved optimizer has its parameters in other groups")
    state = {index[name]: entry for name, entry in _unpack(document["state"], tensors).items()}
    return {
        **_unpack(document["rest"], tensors),
        "state": state,
        "param_groups": groups,
    }


def _pack(
    value: Any,
    path: str,
    tensors: dict[str, Tensor],
) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return {"tensor": path}
    if isinstance(value, Mapping):
        entries = []
        for key, entry in value.items():
            entries.append([key, _pack(entry, f"{path}/{key}".lstrip("/"), tensors)])
        return {"dict": entries}
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
