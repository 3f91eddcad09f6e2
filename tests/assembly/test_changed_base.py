"""A base that is not the one of the training: which tensors differ, counted without contradiction."""

from __future__ import annotations

import re

from lowrank_tune.assembly.finished_run import describe_difference

TRAINED = {f"layer.{number}": f"{number}" for number in range(40)}


def test_the_same_base_has_no_difference() -> None:
    assert describe_difference(TRAINED, dict(TRAINED)) == ""


def test_no_part_is_larger_than_its_whole() -> None:
    """A base with other names once had 49 changed tensors of its 40."""
    other = {f"block.{number}": f"{number}" for number in range(9)}
    other |= {f"layer.{number}": "changed" for number in range(31)}
    words = describe_difference(TRAINED, other)
    assert words == (
        "31 of its 40 tensors differ, among them layer.0; 9 of its 40 tensors are missing here, among them layer.31; "
        "9 tensors were not part of it, among them block.0"
    )
    assert all(int(part) <= int(whole) for part, whole in re.findall(r"(\d+) of its (\d+)", words))
