"""Preference pairs: read from every shape, rendered as two rows with one prompt, never parted, and every faulty one
counted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from stores import dropped_rows
from tokenizers_for_tests import CHATML, MARKS, REAL, SHARED, TINY, tiny, tokenizer

from lowrank_tune.batch import PairBatch, Row
from lowrank_tune.config import DataConfig, SourceConfig
from lowrank_tune.data import (
    ChatTemplate,
    InvalidRow,
    PreferencePair,
    TokenizedDataset,
    TokenizedSplits,
    collate,
    collate_units,
    detect_format,
    load,
    load_heldout_prompts,
    read_source,
    to_pair,
)
from lowrank_tune.data.collate import _common_prefix_length
from lowrank_tune.data.encode import REWRITTEN_ANSWER, SourceContext, encode_chunk
from lowrank_tune.data.message import Message
from lowrank_tune.data.report import SourceReport
from lowrank_tune.data.sources import RowLocation
from lowrank_tune.data.store_writer import Entry
from lowrank_tune.errors import UserError

Q, A, B = "What is 2 + 3?", "It is 5.", "It is 6."
ASK, YES, NO = ({"role": role, "content": text} for role, text in (("user", Q), ("assistant", A), ("assistant", B)))
GPT = [{"from": "human", "value": Q}, {"from": "gpt", "value": A}, {"from": "gpt", "value": B}]
HUMAN = f"\n\nHuman: {Q}\n\nAssistant: "
PLAIN = {"prompt": Q, "chosen": A, "rejected": B}
SHAPES: list[dict[str, Any]] = [
    PLAIN,
    {"prompt": [ASK], "chosen": A, "rejected": B},
    {"prompt": Q, "chosen": [YES], "rejected": [NO]},
    {"prompt": Q, "chosen": [ASK, YES], "rejected": [ASK, NO], "messages": [ASK, YES], "score_chosen": 8.0},
    {"prompt": [ASK], "chosen": [ASK, YES], "rejected": [NO]},
    {"chosen": [ASK, YES], "rejected": [ASK, NO]},
    {"chosen": HUMAN + A, "rejected": HUMAN + B},
    {"prompt": HUMAN, "chosen": f" {A}", "rejected": B},
    {"conversations": GPT[:1], "chosen": GPT[1], "rejected": GPT[2]},
    {"conversations": GPT[:1], "chosen": A, "rejected": B},
    {"instruction": Q, "input": "", "output": A, "chosen": A, "rejected": B},
    {"instruction": Q, "chosen": A, "rejected": B},
    {"question": Q, "chosen": A, "rejected": B, "system": ""},
    {"messages": [ASK], "chosen": YES, "rejected": NO},
]
TEMPLATES: dict[str, ChatTemplate] = {}
TEMPLATE = ChatTemplate.from_tokenizer(tiny())
ROWS = [
    {"prompt": f"What is {n} + 1?", "chosen": f"It is {n + 1}.", "rejected": f"It is {n + 2}, I say.", "margin": n / 8}
    for n in range(40)
]


def template_of(name: str) -> ChatTemplate:
    if name not in TEMPLATES:
        TEMPLATES[name] = ChatTemplate.from_tokenizer(tokenizer(name))
    return TEMPLATES[name]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def loaded(
    tmp_path: Path,
    *sources: SourceConfig | str,
    template: ChatTemplate = TEMPLATE,
    pairs: bool = True,
    cache: str = "cache",
    **data: Any,
) -> TokenizedSplits:
    made = tuple(SourceConfig(dataset=source) if isinstance(source, str) else source for source in sources)
    return load(
        DataConfig(**{"train": made, "eval_fraction": 0.0, **data}),
        template,
        0,
        lambda event: None,
        tmp_path / cache,
        pairs=pairs,
    )


def encoded(template: ChatTemplate, *rows: Any, **data: Any) -> tuple[list[Entry | InvalidRow], SourceReport]:
    source, report = SourceConfig(dataset="x"), SourceReport("x", "preference")
    given = DataConfig(**{"train": (source,), "max_length": 4096, **data})
    return list(
        encode_chunk(
            [(RowLocation("x", 1), row) for row in rows],
            SourceContext(source, given, template, report),
        )
    ), report


@pytest.mark.parametrize("row", SHAPES)
def test_each_layout_becomes_the_same_pair(row: dict[str, Any]) -> None:
    assert detect_format(row, None, pairs=True) == "preference"
    made = to_pair(row, {})
    assert made == PreferencePair((Message("user", Q),), (Message("assistant", A),), (Message("assistant", B),))


def turns(*contents: str, first: str = "user") -> list[dict[str, str]]:
    roles = ["system", "user", "assistant"] if first == "system" else ["user", "assistant"]
    return [
        {
            "role": roles[place] if place < len(roles) else ("user", "assistant")[(place - (first == "system")) % 2],
            "content": content,
        }
        for place, content in enumerate(contents)
    ]


def sizes(row: dict[str, Any]) -> tuple[int, int, int]:
    made = to_pair(row, {})
    return len(made.prompt), len(made.chosen), len(made.rejected)


def test_prompts_are_what_both_sides_begin_with() -> None:
    conversation = turns("s", "q", "a", "r", "b", first="system")
    other = [*conversation[:-1], {"role": "assistant", "content": "c"}]
    assert sizes({"chosen": conversation, "rejected": other}) == (4, 1, 1)
    assert sizes({"prompt": "r", "chosen": conversation, "rejected": other}) == (4, 1, 1), (
        "the prompt is the last question alone"
    )
    assert sizes({"prompt": conversation[:4], "chosen": conversation, "rejected": other}) == (4, 1, 1)
    assert sizes({"prompt": conversation[:4], "chosen": conversation[1:], "rejected": other[1:]}) == (4, 1, 1), (
        "the sides leave the system turn out"
    )
    assert sizes({"prompt": conversation[:2], "chosen": conversation[2:], "rejected": other[2:]}) == (2, 3, 3), (
        "answers of several turns"
    )
    assert sizes({"system": "s", "chosen": conversation[1:], "rejected": other[1:]}) == (4, 1, 1)
    assert sizes({"chosen": turns("q", "a", "r", "b"), "rejected": turns("q", "x", "r", "b")}) == (1, 3, 3)
    twice = [ASK, ASK, YES]
    assert to_pair({"chosen": twice, "rejected": [ASK, ASK, NO]}, {}).prompt[0].content == f"{Q}\n\n{Q}"
    long = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: "
    assert sizes({"chosen": long + "b", "rejected": long + "c"}) == (3, 1, 1)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**PLAIN, "rejected": None}, "column `rejected` is null"),
        ({"prompt": Q, "chosen": A}, "no column `rejected`"),
        ({**PLAIN, "chosen": ""}, "empty answer"),
        ({**PLAIN, "chosen": []}, "empty answer"),
        ({**PLAIN, "chosen": [{**YES, "content": " "}]}, "empty a"),
        ({"chosen": HUMAN + A, "rejected": HUMAN}, "empty answer"),
        ({"chosen": "", "rejected": HUMAN + A}, "empty answer"),
        ({**PLAIN, "rejected": A}, "both answers are equal"),
        ({"chosen": HUMAN + A, "rejected": f"{HUMAN} {A}\n"}, "both answers are equal"),
        ({"chosen": HUMAN + A, "rejected": HUMAN.replace("3", "4") + B}, "different questions"),
        ({"chosen": turns("s", "q", "a", first="system"), "rejected": turns("q", "b")}, "different questions"),
        ({"prompt": "other", "chosen": [ASK, YES], "rejected": [ASK, NO]}, "different questions"),
        ({"chosen": HUMAN + A, "rejected": HUMAN + B + "\n\nHuman: Hm?"}, "the last turn is the user's"),
        ({"chosen": [ASK, YES], "rejected": [ASK]}, "no assistant turn"),
        ({"chosen": A, "rejected": B}, "no prompt"),
        ({"chosen": [YES], "rejected": [NO]}, "no prompt"),
        ({**PLAIN, "prompt": []}, "no prompt"),
        ({**PLAIN, "prompt": " "}, "empty question"),
        ({**PLAIN, "prompt": [ASK, YES]}, "does not end with a question"),
        ({"chosen": HUMAN + A + "\n\nAssistant: " + B, "rejected": HUMAN + B}, "two assistant"),
        ({**PLAIN, "chosen": 1.5e400}, "is not text"),
        ({**PLAIN, "chosen": "\ud800"}, "surrogate"),
        ({**PLAIN, "chosen": [A]}, "not an object"),
        *(
            ({**PLAIN, "margin": bad}, "margin")
            for bad in (-1, True, "x", float("nan"), float("inf"), 1e300, [1], 10**400)
        ),
        ("text", "not an object"),
    ],
)
def test_a_row_without_a_pair_has_a_reason(row: Any, reason: str) -> None:
    with pytest.raises(InvalidRow, match=reason):
        to_pair(row, {})


def test_margins_and_mapped_columns_are_read() -> None:
    assert [to_pair({**PLAIN, "margin": value}, {}).margin for value in (None, 0, 1, 2.5, "0.5", "")] == [
        0.0,
        0.0,
        1.0,
        2.5,
        0.5,
        0.0,
    ]
    row = {"q": Q, "good": A, "bad": B, "by": 2, "prompt": "not this"}
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad", "margin": "by"}
    assert detect_format(row, columns) == detect_format(row, columns, pairs=True) == "preference"
    assert to_pair(row, columns) == PreferencePair(
        (Message("user", Q),), (Message("assistant", A),), (Message("assistant", B),), 2.0
    )
    with pytest.raises(InvalidRow, match="no prompt in column `q`"):
        to_pair({"good": A, "bad": B}, columns)


def test_formats_that_an_algorithm_cannot_use_are_refused(tmp_path: Path) -> None:
    pairs, plain = (
        write(tmp_path / "p.jsonl", [PLAIN] * 3),
        write(tmp_path / "q.jsonl", [{"question": Q, "answer": A}] * 3),
    )
    for row in SHAPES:
        found = detect_format(row)
        assert (
            found == "preference"
            or ("output" in row and found == "alpaca")
            or ("messages" in row and found == "messages")
        )
    for source in (pairs, SourceConfig(dataset=pairs, format="preference")):
        with pytest.raises(
            UserError, match="p.jsonl: these rows are preference pairs; `algorithm: reward` and `algorithm: dpo` learn"
        ):
            loaded(tmp_path, source, pairs=False)
    with pytest.raises(
        UserError,
        match="q.jsonl: the columns answer, question are not a preference pair.*expected `chosen` and `rejected`",
    ):
        loaded(tmp_path, plain)
    with pytest.raises(UserError, match="`format: alpaca` has no preference pairs"):
        loaded(tmp_path, SourceConfig(dataset=pairs, format="alpaca"))


PIECES = [*"ab 1$:)(\n][", "  ", "It is", "é", "👍🏽", "\u2028", *MARKS]
contents = (
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join).filter(lambda text: text.strip() != "")
)


@st.composite
def pair_rows(draw: st.DrawFn, most: int = 3) -> dict[str, Any]:
    """Some exchanges, a last question, and two answers of one turn or of three."""
    words = draw(st.lists(contents, min_size=2, max_size=2 * most).filter(lambda words: len(words) % 2 == 0))
    prompt = turns(*words[:-1])
    if draw(st.booleans()):
        prompt.insert(0, {"role": "system", "content": draw(contents)})
    sides = [
        turns("q", *draw(st.lists(contents, min_size=size, max_size=size)))[1:]
        for size in (draw(st.sampled_from((1, 1, 3))), 1)
    ]
    assume(sides[0] != sides[1])
    repeated = prompt if draw(st.booleans()) else []
    return {"prompt": prompt, "chosen": [*repeated, *sides[0]], "rejected": [*repeated, *sides[1]]}


@pytest.mark.parametrize("name", [*TINY, *REAL])
@settings(max_examples=15)
@given(row=pair_rows())
def test_prompt_and_answer_are_the_full_rendering(name: str, row: dict[str, Any]) -> None:
    template, pair = template_of(name), to_pair(row, {})
    ((made,), _) = encoded(template, row)
    conversations = [(*pair.prompt, *answer) for answer in (pair.chosen, pair.rejected)]
    whole = [template.encode_many([conversation])[0] for conversation in conversations]
    if isinstance(made, InvalidRow):
        ids = [list(each.input_ids) for each in whole if isinstance(each, Row)]
        # Of sides with several answers, the first may change the ids of its prompt: these are the last prompt's then.
        changed = made.reason == REWRITTEN_ANSWER and max(len(pair.chosen), len(pair.rejected)) > 1
        assert len(ids) < 2 or changed or (ids[0] == ids[1] and made.reason == "both answers are equal"), made.reason
        return
    prompt = template.prompt(pair.prompt)
    assert len(made.rows) == len(set(made.conversation_hashes)) == 2
    for row_made, full in zip(made.rows, whole, strict=True):
        assert (
            isinstance(full, Row)
            and list(row_made.input_ids) == list(full.input_ids)
            and list(row_made.input_ids[: len(prompt)]) == prompt
        )
        assert not any(row_made.completion_mask[: len(prompt)]), "an answer inside the prompt is trained"
        assert list(row_made.completion_mask[len(prompt) :]) == list(full.completion_mask[len(prompt) :]) and any(
            row_made.completion_mask
        )
        assert row_made.completion_mask[len(prompt)] or len(pair.chosen) > 1, "the answer's first token is not trained"


def test_what_is_trained_is_the_answer() -> None:
    row = {"prompt": turns("q", "earlier", "r"), "chosen": A, "rejected": B}
    ((made,), _) = encoded(TEMPLATE, row)
    assert isinstance(made, Entry)
    answers = [
        TEMPLATE.decode([token for token, trained in zip(each.input_ids, each.completion_mask, strict=True) if trained])
        for each in made.rows
    ]
    assert answers == [A, B]


def test_a_template_that_drops_the_difference_leaves_a_tie() -> None:
    ((made,), _) = encoded(template_of("llama3"), {**PLAIN, "rejected": A + " \n"})
    assert isinstance(made, InvalidRow) and made.reason == "both answers are equal"


def test_a_prompt_that_the_template_rewrites_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate.from_tokenizer(tiny())
    real = template.prompt_many
    monkeypatch.setattr(
        template, "prompt_many", lambda prompts, tools: [[*ids[:-1], 0] for ids in real(prompts, tools)]
    )
    ((made,), _) = encoded(template, PLAIN)
    assert isinstance(made, InvalidRow) and "not the beginning of both sides" in made.reason


@pytest.mark.parametrize("name", ["chatml", "kit", "words", "thinking"])
@settings(max_examples=25)
@given(row=pair_rows(4), length=st.integers(8, 120))
def test_truncation_takes_the_oldest_exchanges_and_never_an_answer(name: str, row: dict[str, Any], length: int) -> None:
    template, pair = template_of(name), to_pair(row, {})
    ((whole,), _) = encoded(template, row)
    assume(isinstance(whole, Entry))
    ((made,), report) = encoded(template, row, max_length=length, truncation="truncate")
    system = [turn for turn in pair.prompt if turn.role == "system"]
    others = [turn for turn in pair.prompt if turn.role != "system"]
    expected = None
    for gone in range(0, len(others), 2):
        both = [template.encode([*system, *others[gone:], *answer]) for answer in (pair.chosen, pair.rejected)]
        if max(len(each.input_ids) for each in both) <= length:
            expected = both
            break
    if expected is None:
        assert isinstance(made, InvalidRow) and made.reason.startswith(f"longer than data.max_length ({length} tokens)")
        alone = len(template.prompt([*system, others[-1]])) > length
        assert made.reason.endswith("alone") == alone and not report.truncated
    else:
        assert isinstance(made, Entry) and [list(each.input_ids) for each in made.rows] == [
            list(each.input_ids) for each in expected
        ]
        assert report.truncated == (gone > 0) and made.conversation_hashes == whole.conversation_hashes  # type: ignore[union-attr]
    ((dropped,), _) = encoded(template, row, max_length=length)
    fits = max(len(each.input_ids) for each in whole.rows) <= length  # type: ignore[union-attr]
    assert isinstance(dropped, Entry) == fits
    if isinstance(dropped, InvalidRow):
        assert dropped.reason.endswith("its prompt alone") == (len(template.prompt(pair.prompt)) > length)


def pairs_of(store: TokenizedDataset) -> list[tuple[str, str]]:
    texts = [
        TEMPLATE.decode([int(token) for token in store[row].input_ids], special_tokens=True)
        for row in range(len(store))
    ]
    return list(zip(texts[::2], texts[1::2], strict=True))


def test_a_store_of_pairs_has_two_rows_a_unit(tmp_path: Path) -> None:
    store = loaded(tmp_path, write(tmp_path / "a.jsonl", ROWS)).train
    assert (store.rows_per_unit, store.units, len(store)) == (2, 40, 80)
    for n, (chosen, rejected) in enumerate(pairs_of(store)):
        assert (
            f"{n} + 1?" in chosen
            and f"is {n + 1}." in chosen
            and f"{n} + 1?" in rejected
            and f"is {n + 2}, I" in rejected
        )
    assert (
        (store.row_hashes[::2] == store.row_hashes[1::2]).all()
        and len(set(store.row_hashes)) == 40
        and len(set(store.conversation_hashes)) == 80
    )
    assert store.margins.dtype == np.float32 and store.margins.tolist() == [n / 8 for n in range(40) for _ in range(2)]
    assert store.unit_lengths.tolist() == [
        len(store[2 * n].input_ids) + len(store[2 * n + 1].input_ids) for n in range(40)
    ]
    assert store.unit_lengths.dtype == np.int64 and len(store.unit_source_of) == 40
    assert store.row_location(7) == store.row_location(6) == f"{tmp_path}/a.jsonl:4"
    part = store.select_rows(np.array([6, 7, 2, 3]))
    assert pairs_of(part) == [pairs_of(store)[3], pairs_of(store)[1]] == pairs_of(store.select_units(np.array([3, 1])))
    for half in ([6], [7, 6], [1, 2], [6, 8], [6, 7, 2]):
        with pytest.raises(AssertionError, match="pair"):
            store.select_rows(np.array(half))


def test_a_store_of_single_rows_has_one_row_a_unit(tmp_path: Path) -> None:
    store = loaded(
        tmp_path, write(tmp_path / "a.jsonl", [{"question": Q + "!" * n, "answer": A} for n in range(9)]), pairs=False
    ).train
    assert (
        (store.rows_per_unit, store.units) == (1, 9)
        and (store.unit_lengths == store.lengths).all()
        and not store.margins.any()
    )
    batch, plain = collate_units(store, [4, 0, 4], 3), collate([store[4], store[0], store[4]], 3)
    assert (
        all(
            (getattr(batch, name) == getattr(plain, name)).all()
            for name in ("input_ids", "attention_mask", "completion_mask")
        )
        and not isinstance(batch, PairBatch)
        and batch.shared_prefix is None
    )


def test_cached_equals_fresh(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*ROWS, *ROWS[:3]])
    first, again, fresh = (loaded(tmp_path, path, cache=cache) for cache in ("cache", "cache", "other"))
    for each in (again, fresh):
        assert (
            each.report == first.report
            and each.train.rows_per_unit == 2
            and each.train.content_hash() == first.train.content_hash()
        )
        for name in ("row_hashes", "conversation_hashes", "margins", "lengths", "indices", "unit_lengths"):
            assert (getattr(each.train, name) == getattr(first.train, name)).all()
        assert pairs_of(each.train) == pairs_of(first.train)
    assert again.train.folder == first.train.folder != fresh.train.folder


def test_the_same_rows_as_pairs_and_as_single_rows_are_two_stores(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"instruction": Q, "output": A, "chosen": A, "rejected": B}] * 3)
    assert [
        (made.train.rows_per_unit, len(made.train))
        for made in (loaded(tmp_path, path, pairs=pairs) for pairs in (True, False, True))
    ] == [(2, 6), (1, 3), (2, 6)]


def test_content_hash_depends_on_the_rows_and_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = loaded(tmp_path, write(tmp_path / "a.jsonl", ROWS)).train
    known = store.content_hash()
    assert store.select_units(np.arange(40)).content_hash() == known
    hashes = [store.select_units(np.array(units)).content_hash() for units in ([0, 1], [1, 0], [0], [0, 1, 2])]
    same = write(tmp_path / "b.jsonl", [ROWS[0]] * 40)
    twins = loaded(tmp_path, same).train
    same_number, other_number = (twins.select_units(np.array([unit])).content_hash() for unit in (0, 1))
    assert same_number == hashes[2] != other_number, "the ids are equal, and the row's number counts too"
    changed = [dict(row) for row in ROWS]
    changed[39]["rejected"] = "It is 41, I saz."
    hashes.append(loaded(tmp_path, write(tmp_path / "c.jsonl", changed)).train.content_hash())
    assert len({known, *hashes, other_number}) == len(hashes) + 2
    monkeypatch.setattr("lowrank_tune.data.token_store.SLICE", 7)
    assert loaded(tmp_path, str(tmp_path / "a.jsonl"), cache="other").train.content_hash() == store.content_hash()
    mask = store._arrays["completion_mask"].copy()
    mask[-1] ^= True
    assert (
        TokenizedDataset(
            {**store._arrays, "completion_mask": mask}, [], [], store.folder, store.indices, 2
        ).content_hash()
        != store.content_hash()
    )


def test_the_content_hash_depends_on_where_rows_end(tmp_path: Path) -> None:
    """The same tokens with the same mask, cut into other rows, are other data: [a b][c] is not [a][b c]."""
    store = loaded(tmp_path, write(tmp_path / "a.jsonl", ROWS)).train
    tokens = np.array([7, 8, 9], dtype=np.int32), np.ones(3, dtype=bool)
    hashes = set()
    for starts in ([0, 2, 3], [0, 1, 3]):
        rows = dict(zip(("input_ids", "completion_mask"), tokens, strict=True)) | {"starts": np.array(starts)}
        cut = TokenizedDataset({**store._arrays, **rows}, [], [], store.folder, np.arange(2), 2)
        assert cut.lengths.tolist() == np.diff(starts).tolist()
        hashes.add(cut.content_hash())
    assert len(hashes) == 2


@settings(max_examples=30)
@given(
    rows=st.lists(
        st.tuples(*[st.text("ab", min_size=1, max_size=6)] * 3).filter(lambda row: row[1] != row[2]),
        min_size=2,
        max_size=12,
    ),
    data=st.data(),
)
def test_collated_pairs_have_margins_shared_lengths_and_row_numbers(
    rows: list[tuple[str, str, str]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("batches")
    given = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": len(prompt)}
        for prompt, chosen, rejected in rows
    ]
    whole = loaded(folder, write(folder / "a.jsonl", given)).train
    kept = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, unique=True))
    part = whole.select_units(np.array(kept))
    units = data.draw(st.lists(st.integers(0, len(kept) - 1), min_size=1, max_size=5))
    batch = collate_units(part, units, TEMPLATE.pad_id)
    assert len(batch) == 2 * len(units) and str(batch.margin.dtype) == "torch.float32"
    assert str(batch.shared_prefix.dtype) == str(batch.row_indices.dtype) == "torch.int64"
    for place in range(len(batch)):
        number = 2 * kept[units[place // 2]] + place % 2
        length = int(batch.lengths[place])
        assert batch.input_ids[place, :length].tolist() == list(whole[number].input_ids) and batch.completion_mask[
            place, :length
        ].tolist() == list(whole[number].completion_mask)
        assert batch.row_indices[place] == number and batch.margin[place] == len(rows[number // 2][0])
        first, this = list(whole[number - place % 2].input_ids), list(whole[number].input_ids)
        common = max(count for count in range(min(len(first), len(this))) if first[:count] == this[:count])
        assert batch.shared_prefix[place] == (common if place % 2 else 0)


@pytest.mark.parametrize(
    ("ids", "others", "shared"),
    [
        ([1, 2, 3], [1, 2, 3, 4], 2),
        ([1, 2, 3, 4], [1, 2, 3], 2),
        ([1], [1, 2], 0),
        ([1, 2, 3], [1, 2, 3], 2),
        ([1, 2, 3], [2, 2, 3], 0),
    ],
)
def test_the_shared_prefix_leaves_a_token_of_each_row(ids: list[int], others: list[int], shared: int) -> None:
    assert _common_prefix_length(Row(np.array(ids), []), Row(np.array(others), [])) == shared


@settings(max_examples=25)
@given(numbers=st.lists(st.integers(0, 12), min_size=2, max_size=40), share=st.floats(0.05, 0.6))
def test_the_validation_split_never_separates_a_pair(
    numbers: list[int], share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("split")
    made = loaded(folder, write(folder / "a.jsonl", [ROWS[number] for number in numbers]), eval_fraction=share)
    parts = [store for store in (made.train, made.validation) if store is not None]
    found = Counter(pair for store in parts for pair in pairs_of(store))
    assert sum(found.values()) == len(numbers) and all(pair[0].split("?")[0] == pair[1].split("?")[0] for pair in found)
    assert all((store.row_hashes[::2] == store.row_hashes[1::2]).all() for store in parts)
    if made.validation is not None:
        assert not set(pairs_of(made.train)) & set(pairs_of(made.validation))
        assert abs(made.validation.units - share * len(numbers)) <= max(Counter(numbers).values())
    report = made.report
    assert report.train_rows + report.validation_rows == len(numbers) and report.train_rows == made.train.units
    assert report.duplicates == report.train[0].duplicates == len(numbers) - len(set(numbers)) and report.shared == 0


def test_shared_pairs_are_counted_once(tmp_path: Path) -> None:
    path, other = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", [*ROWS[:3], PLAIN])
    report = loaded(tmp_path, path, validation=(SourceConfig(dataset=other),)).report
    assert (report.shared, report.validation_rows, report.duplicates) == (3, 4, 0)
    assert any("40 pairs to train on, 4 to validate" in line for line in report.lines())


def test_bad_pairs_are_dropped_with_their_lines_and_stop_only_above_the_limit(tmp_path: Path) -> None:
    rows: list[Any] = list(ROWS)
    rows[0] = {"prompt": Q, "chosen": A}
    rows[2], rows[4], rows[6] = {**PLAIN, "rejected": " "}, {**PLAIN, "rejected": A}, {**PLAIN, "prompt": "a b " * 300}
    rows[8], rows[9] = {**PLAIN, "chosen": "a b " * 300}, "{broken"
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(
        UserError, match=r"a.jsonl: 6 of 40 rows cannot be used: .*\(line.*max_invalid_fraction"
    ) as caught:
        loaded(tmp_path, path, max_length=128)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    made = loaded(tmp_path, path, max_length=128, max_invalid_fraction=0.2)
    report = made.report.train[0]
    assert (report.read, report.used, report.num_dropped, made.train.units, len(made.train)) == (40, 34, 6, 34, 68)
    assert {fault.line: fault.message for fault in dropped_rows(made.train)} == {
        1: "no column `rejected`",
        3: "empty answer",
        5: "both answers are equal",
        10: "malformed JSON",
        7: "longer than data.max_length (128 tokens), its prompt alone",
        9: "longer than data.max_length (128 tokens)",
    }
    assert report.tokens == made.train.lengths.sum() and report.trained_tokens == sum(
        made.train.num_trained_tokens(row) for row in range(68)
    )


def test_the_system_prompt_of_the_recipe_is_added_to_pairs(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [PLAIN, {**PLAIN, "system": "Mine."}])
    made = pairs_of(loaded(tmp_path, path, template=TEMPLATE, system_prompt="Be brief.").train)
    assert all("Be brief." in side for side in made[0]) and all(
        "Mine." in side and "brief" not in side for side in made[1]
    )


def test_heldout_prompts_of_pairs_have_gold_answers(tmp_path: Path) -> None:
    rows = [{"chosen": HUMAN + f"So.\n#### {n}", "rejected": HUMAN + B} for n in range(30)]
    found = load_heldout_prompts(
        SourceConfig(dataset=write(tmp_path / "a.jsonl", [{"chosen": "x"}, *rows])), 10, 0, "Be brief."
    )
    assert len(found) == 10 and all([turn.role for turn in prompt.messages] == ["system", "user"] for prompt in found)
    assert all(prompt.row["chosen"].endswith(f" {prompt.ground_truth}") for prompt in found)
    tutor = load_heldout_prompts(
        SourceConfig(dataset="builtin:arithmetic-preferences", split="heldout", ground_truth="last_number"), 12, 1
    )
    assert len(tutor) == 12 and all(prompt.ground_truth for prompt in tutor)


def test_builtin_preferences_are_all_used_and_the_splits_are_disjoint(tmp_path: Path) -> None:
    train, heldout = (
        loaded(tmp_path, SourceConfig(dataset="builtin:arithmetic-preferences", split=split, max_samples=90))
        for split in ("train", "heldout")
    )
    assert train.report.train[0].used == heldout.report.train[0].used == 90
    assert not {pair[0] for pair in pairs_of(train.train)} & {pair[0] for pair in pairs_of(heldout.train)}
    assert train.train.content_hash() != heldout.train.content_hash()
    for fault, sentence in (({"split": "test"}, "no split `test`"), ({"config_name": "main"}, "no configurations")):
        with pytest.raises(UserError, match=f"builtin:arithmetic-preferences: .*{sentence}"):
            read_source(SourceConfig(dataset="builtin:arithmetic-preferences", **fault), 0)


REASONS: dict[str, tuple[int, dict[str, list[int]]]] = {  # pairs, and every line that holds none
    "hh_rlhf/helpful-base_test.jsonl.gz": (
        1200,
        {"two assistant turns in a row": [], "empty answer": [121, 741], "both answers are equal": [722]},
    ),
    "hh_rlhf/helpful-online_test.jsonl.gz": (
        1137,
        {
            "empty answer": [465, 553, 894, 1054],
            "both answers are equal": [199, 737],
            "no answer: the last turn is the user's": [786, 1056],
        },
    ),
    "llamafactory_demos/dpo_en_demo.json.gz": (300, {}),
    "gsm8k/derived_pairs.jsonl.gz": (1200, {}),
    "rasbt_instruction/instruction-data-with-preference.json": (1100, {"both answers are equal": []}),
    "open_instruct_samples/preference_sample.jsonl.gz": (100, {}),
    "hub_samples/ultrafeedback_binarized.jsonl": (1, {}),
}
MANY = {"two assistant turns in a row": 10, "both answers are equal": 6}


@pytest.mark.slow
@pytest.mark.parametrize("name", REASONS)
def test_real_pairs_are_used_or_have_a_reason(tmp_path: Path, name: str) -> None:
    if not (SHARED / "data" / name).exists():
        pytest.skip("needs ../shared")
    count, reasons = REASONS[name]
    template = ChatTemplate.from_tokenizer(tiny(CHATML))
    made = loaded(tmp_path, str(SHARED / "data" / name), template=template, max_length=100_000)
    dropped: dict[str, list[int]] = {}
    for fault in dropped_rows(made.train):
        dropped.setdefault(fault.message, []).append(fault.line or 0)
    expected = {reason: len(lines) or MANY[reason] for reason, lines in reasons.items()}
    assert {reason: len(lines) for reason, lines in dropped.items()} == expected
    assert all(dropped[reason] == lines for reason, lines in reasons.items() if lines)
    assert made.train.units == made.report.train[0].used == count - made.report.train[0].num_dropped
    for unit in range(0, made.train.units, 37):
        batch = collate_units(made.train, [unit], template.pad_id)
        shared = int(batch.shared_prefix[1])
        starts = [row.index(True) for row in batch.completion_mask.tolist()]
        assert starts[0] == starts[1] <= shared, "the prompt is the same on both sides"
