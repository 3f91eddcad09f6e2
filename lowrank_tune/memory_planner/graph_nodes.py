"""Kinds of nodes of a traced graph: views, operations that can be a part of a larger kernel, and all others."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

VIEWS = (
    "_unsafe_view",
    "alias",
    "as_strided",
    "broadcast_in_dim",
    "detach",
    "diagonal",
    "expand",
    "getitem",
    "permute",
    "reshape",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
    "view_of",
)
POINTWISE = (
    "_to_copy",
    "arange",
    "cat",
    "clone",
    "constant_pad_nd",
    "convert_element_type",
    "full",
    "full_like",
    "index",
    "gather",
    "iota",
    "scalar_tensor",
    "select_scatter",
    "slice_scatter",
    "tril",
    "triu",
    "where",
)
"""Names of operators without torch's tag `pointwise` for which inductor makes pointwise code."""
REDUCTIONS = ("sum", "mean", "amax", "amin", "prod", "var", "var_mean", "prepare_softmax_online")


def name_of(node: Node) -> str:
    """Returns the name of the operator of a node, empty for an input or output of the graph."""
    if node.op != "call_function":
        return ""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return str(getattr(node.target, "__name__", ""))
    return str(schema.name.partition("::")[2])


def is_view(node: Node) -> bool:
    """Returns whether a node computes nothing."""
    return name_of(node) in VIEWS


def is_fusable(node: Node) -> bool:
    """Returns whether an operation can be a part of a larger kernel."""
    target: Any = node.target
    if getattr(target, "namespace", "") not in ("aten", "prims"):
        return False
    name = name_of(node)
    if name in REDUCTIONS:
        return _reduces_last_dims(node)
    return name in POINTWISE or torch.Tag.pointwise in target.tags


def _reduces_last_dims(node: Node) -> bool:
    """Returns whether the reduced dimensions are the last ones, so that each result is computed from a piece of memory
    that belongs together."""
    ndim = node.all_input_nodes[0].meta["val"].ndim
    dims = node.args[1] if len(node.args) > 1 else None
    if not isinstance(dims, (list, tuple, int)):
        return False
    numbers = [dims] if isinstance(dims, int) else list(dims)
    reduced = sorted(int(dim) % ndim for dim in numbers)
    return reduced == list(range(ndim - len(reduced), ndim))


def source_of(node: Node) -> Node:
    """Returns the node whose output a view reads; a node that is no view itself."""
    while is_view(node):
        node = node.all_input_nodes[0]
    return node


def is_tuple_output(node: Node) -> bool:
    """Returns whether a node is one of several outputs of a node that is no view."""
    return name_of(node) == "getitem" and not is_view(node.all_input_nodes[0])


def storage_of(node: Node) -> Node:
    """Returns the tensor in memory that a view is a part of."""
    while is_view(node) and not is_tuple_output(node):
        node = node.all_input_nodes[0]
    return node
