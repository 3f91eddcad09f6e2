"""Plain text rows: which ids a document has, where long ones are cut, and how documents are packed."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from tokenizers_for_tests import CHATML, SHARED, tiny, tokenizer
from transformers import PreTrainedTokenizerFast
from unit_stores import write_units

from lowrank_tune.batch import Row
from lowrank_tune.config import DataConfig, SourceConfig
from lowrank_tune.data import (
    ChatTemplate,
    InvalidRow,
    TokenizedSplits,
    detect_format,
    load,
    load_heldout_prompts,
    load_prompts,
)
from lowrank_tune.data.packing import best_fit_decreasing, pack_documents
from lowrank_tune.data.text_rows import cut_document, text_of_row
from lowrank_tune.errors import UserError
from lowrank_tune.events import ignore_event

TEMPLATE = ChatTemplate.from_tokenizer(tiny())
WORDS = ["the", "cat", "and", "dog", "ran", "to", "a", "red", "house", "where", "it", "is", "12", "+", "30"]


def texts(count: int, seed: int = 0) -> list[str]:
    """Stories of 3 to 60 words."""
    rng = random.Random(seed)
    return [f"{number}: " + " ".join(rng.choices(WORDS, k=rng.randint(3, 60))) for number in range(count)]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def loaded(
    tmp_path: Path, *sources: SourceConfig | str, template: ChatTemplate = TEMPLATE, **data: Any
) -> TokenizedSplits:
    made = tuple(SourceConfig(dataset=source) if isinstance(source, str) else source for source in sources)
    config = DataConfig(**{"train": made, "eval_fraction": 0.0, "max_length": 64, **data})
    return load(config, template, 0, ignore_event, tmp_path / "cache")


# --- the ids of a document --------------------------------------------------------------------------------------------


def with_bos(template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer that begins every text with <s>."""
    made = tiny(template)
    state = Tokenizer.from_str(made.backend_tokenizer.to_str())
    state.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.convert_tokens_to_ids("<s>"))]
    )
    own = PreTrainedTokenizerFast(
        tokenizer_object=state, bos_token="<s>", eos_token=made.eos_token, pad_token=made.pad_token
    )
    own.chat_template = template
    return own


@pytest.mark.parametrize(
    "name",
    [
        "kit",
        "words",
        "chatml",
        "tokenizers/smollm2-135m-instruct",
        "tokenizers/gpt2",
        "tokenizers/mistral-7b-v0.2",
        "stories260K",
    ],
)
def test_ids_are_those_of_the_tokenizer_with_its_end(name: str) -> None:
    made = tokenizer(name)
    template = ChatTemplate.from_tokenizer(made)
    given = [*texts(20), " two  spaces ", "\n\nline\n", "naïve 👍🏽"]
    for text, ids in zip(given, template.encode_texts(given), strict=True):
        assert ids == [*made(text)["input_ids"], made.eos_token_id]


def test_a_bos_is_there_only_if_the_tokenizer_adds_it() -> None:
    made = with_bos()
    ids = ChatTemplate.from_tokenizer(made).encode_texts(["the cat"])[0]
    assert ids[0] == made.bos_token_id and ids[-1] == made.eos_token_id and ids.count(made.bos_token_id) == 1
    assert made.bos_token_id not in TEMPLATE.encode_texts(["the cat"])[0]


def test_control_tokens_in_a_text_are_plain_characters() -> None:
    template = ChatTemplate.from_tokenizer(tiny(CHATML))
    (ids,) = template.encode_texts(["a<|im_end|>b<s>c"])
    assert ids[-1] in template.end_ids and not template.special_tokens_in(ids[:-1])
    assert template.decode(ids[:-1], special_tokens=True) == "a<|im_end|>b<s>c"


def test_a_tokenizer_without_end_writes_none() -> None:
    made = tiny(CHATML)
    made.eos_token = None
    assert ChatTemplate.from_tokenizer(made).text_delimiters == ([], [])


@given(count=st.integers(1, 50), max_length=st.integers(8, 20))
def test_a_long_document_is_cut_without_loss(count: int, max_length: int) -> None:
    pieces = cut_document(list(range(count)), max_length)
    assert list(itertools.chain(*(piece.input_ids for piece in pieces))) == list(range(count))
    lengths = [len(piece.input_ids) for piece in pieces]
    assert set(lengths[:-2]) <= {max_length} and max(lengths) <= max_length
    # nothing would predict a last piece of one token
    assert lengths[-1] > 1 or count == 1
    assert len(lengths) == 1 or lengths[-2] == max_length - (count % max_length == 1)
    assert all(all(piece.completion_mask) and len(piece.completion_mask) == len(piece.input_ids) for piece in pieces)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"other": "a"}, "no column `text`"),
        ({"text": None}, "column `text` is null"),
        ({"text": " \n"}, "empty text"),
        ({"text": ["a"]}, "the text is not text"),
        ({"text": "\ud800"}, "the text contains a lone surrogate, which UTF-8 cannot encode"),
    ],
)
def test_faulty_rows_have_a_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRow) as caught:
        text_of_row(row, {})
    assert caught.value.reason == reason


# --- which rows are plain text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"text": "a"}, {}, "text"),
        ({"text": "a", "url": "b", "title": "c"}, {}, "text"),
        ({"story": "a"}, {"text": "story"}, "text"),
        ({"text": "a", "code": "b", "test_list": []}, {}, "mbpp"),
        ({"task": "a", "code": "b", "test_list": []}, {"text": "task"}, "mbpp"),
        ({"text": "a", "messages": []}, {}, "messages"),
        ({"text": "a", "prompt": "b", "completion": "c"}, {}, "prompt_completion"),
        ({"text": "a", "prompt": "b", "completion": "c"}, {"text": "text"}, "text"),
        ({"text": "a", "chosen": "b", "rejected": "c"}, {}, "preference"),
    ],
)
def test_text_is_detected_after_every_other_format(row: dict[str, Any], columns: dict[str, str], expected: str) -> None:
    assert detect_format(row, columns) == expected


def test_other_algorithms_refuse_plain_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts(5)])
    source = SourceConfig(dataset=path)
    with pytest.raises(UserError, match=r"a.jsonl: these rows are plain text .*`algorithm: sft`"):
        load_prompts(DataConfig(train=(source,)), TEMPLATE, 0, ignore_event)
    with pytest.raises(UserError, match="plain text"):
        load_heldout_prompts(source, 3, 0)
    for format_name in ("auto", "text"):
        pairs = DataConfig(train=(SourceConfig(dataset=path, format=format_name),))
        with pytest.raises(UserError, match="preference pair"):
            load(pairs, TEMPLATE, 0, ignore_event, tmp_path / "cache", pairs=True)


# --- packs ------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 20), max_size=80))
def test_best_fit_decreasing_fills_bins(lengths: list[int]) -> None:
    lengths = sorted(lengths, reverse=True)
    bins = best_fit_decreasing(lengths, 20)
    assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
    rooms = [20 - sum(lengths[index] for index in one) for one in bins]
    assert all(room >= 0 for room in rooms)
    # No bin but one is half empty: its last row would have fitted into another one.
    assert sum(room >= 10 for room in rooms) <= 1


def test_best_fit_decreasing_by_hand() -> None:
    """The 3 goes where 3 is left, not where 4 is."""
    assert best_fit_decreasing([7, 6, 3, 3, 1], 10) == [[0, 2], [1, 3, 4]]


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    max_length=st.sampled_from([8, 16]),
    seed=st.integers(0, 3),
)
def test_packs_have_every_piece_once_and_fit(
    lengths: list[int], max_length: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    documents = [cut_document(list(range(100 * n, 100 * n + length)), max_length) for n, length in enumerate(lengths)]
    store = write_units(tmp_path_factory.mktemp("packs") / "store", documents, "text")
    packed, packing = pack_documents(store, max_length, seed)
    assert packing is not None and (packing.packs, packing.documents) == (packed.units, len(store))
    assert packing.efficiency == pytest.approx(sum(lengths) / (packed.units * max_length))
    assert packed.unit_lengths.max() <= max_length and sorted(packed.indices) == sorted(store.indices)
    assert sum(packed.unit_lengths <= max_length / 2) <= 1
    again, _ = pack_documents(store, max_length, seed)
    assert again.indices.tolist() == packed.indices.tolist()
    assert again.unit_starts.tolist() == packed.unit_starts.tolist()


def test_packs_are_of_one_source_and_other_units_stay(tmp_path: Path) -> None:
    def rows(count: int) -> list[Row]:
        return [Row([5, 6, 7], [False, True, True])] * count

    units = [rows(1), rows(2), rows(1), rows(1)]
    store = write_units(tmp_path / "store", units, "text", sources=[0, 1, 0, 1])
    store.reports[1].format = "messages"
    packed, _ = pack_documents(store, 8, 0)
    assert packed.unit_source_of.tolist() == [0, 1, 1] and np.diff(packed.unit_starts).tolist() == [2, 2, 1]
    assert packed.indices[2:].tolist() == [1, 2, 4]
    store.reports[0].format = "messages"
    same = store.select_units(np.arange(4))
    assert pack_documents(same, 8, 0) == (same, None)


def test_documents_are_held_out_whole_and_packed(tmp_path: Path) -> None:
    given = texts(80)
    path = write(tmp_path / "a.jsonl", [{"story": text} for text in [*given, given[0]]])
    made = loaded(tmp_path, SourceConfig(dataset=path, columns={"text": "story"}), eval_fraction=0.2)
    report, validation, packing = made.report, made.validation, made.report.packing
    assert validation is not None and packing is not None
    assert report.train[0].format == "text" and report.train[0].trained_tokens == report.train[0].tokens
    assert (report.train_rows, report.duplicates, report.shared) == (made.documents.units, 1, 0)
    assert report.train_rows + validation.units == report.train_rows + report.validation_rows == 81
    assert packing.packs == made.train.units < packing.documents == len(made.documents) and packing.efficiency > 0.9
    assert made.train.unit_lengths.max() <= 64 and not np.isin(validation.row_hashes, made.train.row_hashes).any()
    for store in (made.documents, validation):
        for unit in range(store.units):
            ids = np.concatenate([store[int(row)].input_ids for row in store.rows_of(np.array([unit]))])
            line = int(store.row_location(int(store.unit_starts[unit])).rpartition(":")[2])
            assert (
                TEMPLATE.decode(ids[:-1]) == [*given, given[0]][line - 1] and ids[-1] == TEMPLATE.tokenizer.eos_token_id
            )
    assert any("packs of up to 64 tokens" in line for line in report.lines())


def test_a_store_depends_on_the_bos_of_its_tokenizer(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts(5)])
    plain = loaded(tmp_path, path, template=ChatTemplate.from_tokenizer(tiny(CHATML)))
    marked = loaded(tmp_path, path, template=ChatTemplate.from_tokenizer(with_bos(CHATML)))
    assert plain.train.folder != marked.train.folder
    assert marked.report.train[0].tokens == plain.report.train[0].tokens + 5


def test_a_mixture_of_text_and_conversations(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts(40)])
    other = write(tmp_path / "b.jsonl", [{"question": f"What is {n} + 1?", "answer": f"{n + 1}."} for n in range(30)])
    made = loaded(tmp_path, path, other, eval_rows=5)
    train = made.train
    assert [report.format for report in made.report.train] == ["text", "question_answer"]
    of_talks = np.flatnonzero(train.unit_source_of == 1)
    assert (np.diff(train.unit_starts)[of_talks] == 1).all() and made.report.train_rows == 65
    assert not train.is_document[train.rows_of(of_talks)].any() and train.is_document.sum() >= 30


def test_real_stories(tmp_path: Path) -> None:
    path = SHARED / "data" / "text" / "tinystories.jsonl.gz"
    if not path.is_file():
        pytest.skip("needs ../shared")
    made = loaded(tmp_path, str(path), max_length=512)
    packing = made.report.packing
    assert packing is not None and made.report.train[0].used == made.report.train_rows == 1092
    assert packing.efficiency > 0.85 and packing.tokens == made.report.train[0].tokens
