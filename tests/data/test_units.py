"""Units of several rows: each is drawn, split, selected, located and counted as one, with its rows adjacent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit_stores import conversation_rows, write_units

from lowrank_tune.batch import PairBatch, Row
from lowrank_tune.config import DataConfig, SourceConfig, TrainingConfig
from lowrank_tune.data import TokenizedDataset, collate_rows, collate_units
from lowrank_tune.data.load import _split
from lowrank_tune.data.sampler import row_sampler
from lowrank_tune.data.store_writer import Entry, StoreWriter


def row(length: int, first: int = 5) -> Row:
    return Row([first + place for place in range(length)], [True] * length)


def units_by_hand(folder: Path) -> TokenizedDataset:
    """Units of 1, 3 and 2 rows, with 4, 3 + 2 + 2 and 6 + 1 tokens."""
    return write_units(folder, [[row(4)], [row(3), row(2), row(2, 50)], [row(6), row(1)]])


def ids_of(store: TokenizedDataset) -> list[list[int]]:
    return [list(map(int, one.input_ids)) for one in store]


def test_numbers_of_units_by_hand(tmp_path: Path) -> None:
    store = units_by_hand(tmp_path / "store")
    assert (store.units, len(store), store.rows_per_unit) == (3, 6, 1)
    assert store.unit_starts.tolist() == [0, 1, 4, 6]
    assert store.unit_lengths.tolist() == [4, 7, 7] and store.unit_lengths.dtype == np.int64
    assert store.padded_unit_lengths == [4, 9, 12]
    assert store.unit_source_of.tolist() == [0, 0, 0]
    assert store.rows_of(np.array([2, 0, 2])).tolist() == [4, 5, 0, 4, 5]
    assert store.units_of(np.arange(6)).tolist() == [0, 1, 1, 1, 2, 2]
    assert store.families.tolist() == [0, 1, 1, 1, 2, 2]
    assert store.sum_units(np.arange(6)).tolist() == [0, 6, 9]
    assert len(set(store.unit_hashes.tolist())) == 3 and (store.row_hashes[1:4] == store.unit_hashes[1]).all()
    assert [store.row_location(number) for number in (0, 1, 3, 5)] == [f"source 0:{line}" for line in (1, 2, 2, 3)]


def test_selected_units_keep_their_rows(tmp_path: Path) -> None:
    store = units_by_hand(tmp_path / "store")
    part = store.select_units(np.array([2, 1]))
    assert part.unit_starts.tolist() == [0, 2, 5] and part.unit_lengths.tolist() == [7, 7]
    assert ids_of(part) == [ids_of(store)[number] for number in (4, 5, 1, 2, 3)]
    assert ids_of(store.select_rows(np.array([4, 5, 1, 2, 3]))) == ids_of(part)
    again = part.select_units(np.array([1]))
    assert ids_of(again) == ids_of(store)[1:4] and again.row_location(0) == "source 0:2"
    assert again.unit_hashes.tolist() == store.unit_hashes[1:2].tolist()
    for torn in ([1, 2], [2, 3], [4], [5, 4], [0, 1]):
        with pytest.raises(AssertionError, match="whole units"):
            store.select_rows(np.array(torn))


def test_a_store_without_units(tmp_path: Path) -> None:
    empty = units_by_hand(tmp_path / "store").select_units(np.zeros(0, dtype=np.int64))
    assert (empty.units, len(empty), empty.padded_unit_lengths) == (0, 0, [])
    assert len(empty.unit_lengths) == len(empty.unit_hashes) == len(empty.families) == 0


def test_an_entry_has_rows_and_a_pair_two(tmp_path: Path) -> None:
    for rows_per_unit, rows in ((1, ()), (2, (row(3),)), (2, (row(3), row(2), row(1)))):
        with pytest.raises(AssertionError), StoreWriter(tmp_path / "store", rows_per_unit) as writer:
            writer.add([Entry(rows, tuple(range(len(rows))))], 0, [(0, 1)])


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(1, 4), min_size=2, max_size=30),
    share=st.floats(0.05, 0.8),
    seed=st.integers(0, 3),
)
def test_a_split_keeps_units_whole(
    counts: list[int], share: float, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    units = [[row(2 + number + index) for index in range(count)] for number, count in enumerate(counts)]
    full = write_units(tmp_path_factory.mktemp("units") / "store", units)
    train, validation = _split(full, share, seed)
    assert validation is not None and train.units + validation.units == len(counts)
    for part in (train, validation):
        assert sorted(set(part.unit_hashes.tolist())) == sorted(set(part.row_hashes.tolist()))
        for unit in range(part.units):
            rows = part.rows_of(np.array([unit]))
            number = int(part.row_location(int(rows[0])).rpartition(":")[2]) - 1
            assert part.lengths[rows].tolist() == [len(one.input_ids) for one in units[number]]


def test_steps_count_units_or_tokens_of_all_their_rows(tmp_path: Path) -> None:
    units = [[row(3)] * (1 + number % 3) for number in range(30)]
    store = write_units(tmp_path / "store", units)
    data = DataConfig(train=(SourceConfig(dataset="x"),))
    by_units = row_sampler(store, data, TrainingConfig(global_batch_size=5), 0)
    steps = [by_units.rows(step) for step in range(by_units.steps_per_epoch)]
    assert [len(step) for step in steps] == [5] * 6 and sorted(sum(steps, [])) == list(range(30))
    by_tokens = row_sampler(store, data, TrainingConfig(tokens_per_step=27), 0)
    for step in range(by_tokens.steps_per_epoch):
        rows = by_tokens.rows(step)
        assert sum(len(units[unit]) * 3 for unit in rows) <= 27


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_collated_units_are_adjacent_with_their_shared_lengths(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    shapes = data.draw(
        st.lists(
            st.tuples(st.integers(0, 9), st.lists(st.integers(1, 6), min_size=1, max_size=4)), min_size=1, max_size=6
        )
    )
    units = [conversation_rows(rng, prefix, tails) for prefix, tails in shapes]
    store = write_units(tmp_path_factory.mktemp("units") / "store", units)
    drawn = data.draw(st.lists(st.integers(0, len(units) - 1), min_size=1, max_size=6))
    batch = collate_units(store, drawn, 0)
    expected = [(one, shapes[unit][0] if number else 0) for unit in drawn for number, one in enumerate(units[unit])]
    assert not isinstance(batch, PairBatch) and len(batch) == len(expected)
    for place, (one, _) in enumerate(expected):
        length = int(batch.lengths[place])
        assert batch.input_ids[place, :length].tolist() == list(one.input_ids)
        assert batch.completion_mask[place, :length].tolist() == list(one.completion_mask)
    if all(len(units[unit]) == 1 for unit in drawn):
        assert batch.shared_prefix is None
    else:
        assert batch.shared_prefix is not None
        assert batch.shared_prefix.tolist() == [shared for _, shared in expected]


def test_some_rows_of_a_unit_share_with_the_first_of_them(tmp_path: Path) -> None:
    """Rows of one unit, cut apart: the second group begins again at 0."""
    rng = np.random.default_rng(0)
    store = write_units(tmp_path / "store", [conversation_rows(rng, 7, [5, 4, 3]), conversation_rows(rng, 3, [9])])
    batch = collate_rows(store, np.array([1, 2, 3, 2]), 0)
    assert batch.shared_prefix is not None and batch.shared_prefix.tolist() == [0, 7, 0, 0]
    assert collate_rows(store, np.array([2, 3]), 0).shared_prefix is None


def test_documents_share_nothing(tmp_path: Path) -> None:
    """Each begins with the same token, and they are free to be in any micro-batch."""
    store = write_units(tmp_path / "store", [[row(4), row(3), row(9)], [row(5)]], format_name="text")
    assert store.is_document.all() and len(set(store.families.tolist())) == 4
    assert collate_units(store, [0, 1], 0).shared_prefix is None
