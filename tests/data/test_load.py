"""From files to stores: every row is used or reported, caches are found and mended, and bad input is one sentence."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import dropped_rows
from tokenizers_for_tests import CHATML, NO_END, SHARED, THINKING, tiny

from lowrank_tune.config import DataConfig, SourceConfig
from lowrank_tune.data import (
    ChatTemplate,
    InvalidRow,
    TokenizedDataset,
    load,
    load_heldout_prompts,
    load_prompts,
    read_source,
    to_conversation,
)
from lowrank_tune.data.encode import conversation_of
from lowrank_tune.data.hub import describe_hub_error
from lowrank_tune.data.sources import _looks_like_a_path
from lowrank_tune.data.tokenize import format_of
from lowrank_tune.errors import TrainingError, UserError
from lowrank_tune.events import Event, Progress

TEMPLATE = ChatTemplate.from_tokenizer(tiny())
ROWS = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(40)]


def write(path: Path, rows: list[Any], array: bool = False) -> str:
    text = json.dumps(rows) if array else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def loaded(tmp_path: Path, *sources: SourceConfig | str, template: ChatTemplate = TEMPLATE, **data: Any) -> Any:
    made = tuple(SourceConfig(dataset=source) if isinstance(source, str) else source for source in sources)
    return load(
        DataConfig(**{"train": made, "eval_fraction": 0.0, **data}),
        template,
        0,
        lambda event: None,
        tmp_path / "cache",
    )


@pytest.mark.parametrize(
    ("name", "array"), [("a.jsonl", False), ("a.json", False), ("a.jsonl", True), ("a.json.gz", True), ("a.txt", True)]
)
def test_files_are_read_by_their_contents_not_their_names(tmp_path: Path, name: str, array: bool) -> None:
    rows = [*ROWS, {"question": "a\u2028b\x85c", "answer": "d\u2029"}]
    found = read_source(SourceConfig(dataset=write(tmp_path / name, rows, array)), 0)
    assert [row for _, row in found] == rows and len(found) == 41
    assert [place.line for place, _ in found] == list(range(1, 42))


def test_only_newlines_end_a_json_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + '{"question": "a\u2028b", "answer": "c"}\r\n\r\n{"question": "d", "answer": "e"}'.encode()
    )
    assert [(place.line, row) for place, row in read_source(SourceConfig(dataset=str(path)), 0)] == [
        (1, {"question": "a\u2028b", "answer": "c"}),
        (3, {"question": "d", "answer": "e"}),
    ]


def test_csv_and_parquet_rows_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('question,answer\n"a, ""b""\nc",d\n1,2,3\ne,f\n')
    found = [
        row if isinstance(row, dict) else row.reason
        for _, row in read_source(SourceConfig(dataset=str(tmp_path / "a.csv")), 0)
    ]
    assert (
        found[0] == {"question": 'a, "b"\nc', "answer": "d"}
        and "fields" in found[1]
        and found[2] == {"question": "e", "answer": "f"}
    )
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table.from_pylist(ROWS)
    parquet.write_table(table, tmp_path / "a.bin")
    assert [row for _, row in read_source(SourceConfig(dataset=str(tmp_path / "a.bin")), 0)] == ROWS


def test_a_folder_is_read_in_order_and_drawn_with_the_seed(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for name, part in (("b.jsonl", ROWS[20:]), ("a.json", ROWS[:20]), ("c.csv", [])):
        write(folder / name, part)
    (folder / "notes.md").write_text("no data")
    every = list(read_source(SourceConfig(dataset=str(folder)), 0))
    assert [row for _, row in every] == ROWS and str(every[20][0]).endswith("rows/b.jsonl:1")
    drawn = [
        [row for _, row in read_source(SourceConfig(dataset=str(folder), max_samples=15), seed)] for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 15
    assert drawn[0] == [row for row in ROWS if row in drawn[0]], "in their own order, none twice"


def test_counts_add_up_with_their_lines(tmp_path: Path) -> None:
    rows = [json.dumps(row) for row in ROWS]
    rows[2], rows[5], rows[7], rows[11] = (
        "{broken",
        '{"question": "a", "answer": " "}',
        "[1]",
        '{"question": "\\ud800", "answer": "a"}',
    )
    rows[13], rows[17] = "[" * 100_000, '{"question": "a", "answer": ' + "9" * 5000 + "}"
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(rows))
    with pytest.raises(
        UserError,
        match=r"data.jsonl: 6 of 40 rows cannot be used: .*malformed JSON \(lines 3, 14, 18\).*max_invalid_fraction",
    ):
        loaded(tmp_path, str(path))
    made = loaded(tmp_path, str(path), max_invalid_fraction=0.2)
    report = made.report.train[0]
    assert (report.read, report.used, report.num_dropped, len(made.train)) == (40, 34, 6, 34)
    assert report.tokens == made.train.lengths.sum() and report.trained_tokens == sum(
        made.train.num_trained_tokens(i) for i in range(34)
    )
    assert sorted(fault.line for fault in dropped_rows(made.train)) == [3, 6, 8, 12, 14, 18]
    assert str(next(dropped_rows(made.train))).endswith("data.jsonl:3: malformed JSON")
    assert made.train.row_location(2).endswith("data.jsonl:4") and report.ground_truths == 34
    prompts = load_prompts(
        DataConfig(train=(SourceConfig(dataset=str(path)),), max_invalid_fraction=0.2),
        TEMPLATE,
        0,
        lambda event: None,
    )
    assert str(prompts.locations[0]) == made.train.row_location(0) and prompts.examples[0].ground_truth == "1"
    assert json.loads(json.dumps(made.report.to_dict()))["train"][0]["dropped"]["empty answer"]["count"] == 1


def test_a_store_of_another_version_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    with monkeypatch.context() as patch:
        patch.setattr("lowrank_tune.data.tokenize.VERSION", 6)
        old = loaded(tmp_path, path).train
    made = loaded(tmp_path, path).train
    assert made.folder != old.folder and made.content_hash() == old.content_hash()
    assert TokenizedDataset.open(old.folder) is not None, "the old store was changed"


def test_stores_are_found_by_content_and_made_again_if_damaged(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    first = loaded(tmp_path, path)
    events: list[Event] = []
    again = load(
        DataConfig(train=(SourceConfig(dataset=path),), eval_fraction=0.0),
        TEMPLATE,
        0,
        events.append,
        tmp_path / "cache",
    )
    assert not any(isinstance(event, Progress) for event in events), "it was tokenized again"
    assert again.report == first.report and all(
        list(a.input_ids) == list(b.input_ids) for a, b in zip(again.train, first.train, strict=True)
    )
    for victim in sorted(first.train.folder.iterdir()):
        expected, kept = [list(row.input_ids) for row in first.train], victim.read_bytes()
        for damage in (kept[: len(kept) // 2], kept[:-1] + bytes([kept[-1] ^ 1]), None) if kept else (b"x", None):
            victim.unlink() if damage is None else victim.write_bytes(damage)
            assert TokenizedDataset.open(first.train.folder) is None or victim.name == "store.json"
            assert [list(row.input_ids) for row in loaded(tmp_path, path).train] == expected
    write(tmp_path / "a.jsonl", ROWS[:-1])
    assert len(loaded(tmp_path, path).train) == 39
    assert loaded(tmp_path, path, system_prompt="Be brief.").train.lengths[0] > first.train.lengths[0]
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.raises(TrainingError, match="LOWRANK_TUNE_CACHE"):
        loaded(tmp_path, write(tmp_path / "a.jsonl", ROWS))
    (tmp_path / "cache").unlink()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lowrank_tune.data.store_writer.ArrayFile.append", full)
    with pytest.raises(TrainingError, match="the disk is full: .* free on the disk of .*LOWRANK_TUNE_CACHE"):
        loaded(tmp_path, str(tmp_path / "a.jsonl"))
    monkeypatch.undo()
    assert len(loaded(tmp_path, str(tmp_path / "a.jsonl")).train) == 40


@pytest.mark.parametrize("template", [None, CHATML, NO_END, THINKING])
def test_truncation_at_every_length(tmp_path: Path, template: str | None) -> None:
    made = ChatTemplate.from_tokenizer(tiny(template))
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(3) for role in ("user", "assistant")]
    conversation = to_conversation({"messages": turns}, "messages", {}).messages
    encoded = made.encode_all([conversation[:end] for end in (2, 4, 6)])
    whole = [rows[0] for rows in encoded if not isinstance(rows, InvalidRow)]
    path = write(tmp_path / "a.jsonl", [{"messages": turns}, {"messages": turns[:2]}])
    for length in range(len(whole[0].input_ids), len(whole[2].input_ids) + 2):
        data = loaded(tmp_path, path, template=made, max_length=length, truncation="truncate")
        expected = max((row for row in whole if len(row.input_ids) <= length), key=lambda row: len(row.input_ids))
        assert list(data.train[0].input_ids) == list(expected.input_ids) and list(
            data.train[0].completion_mask
        ) == list(expected.completion_mask)
        assert data.report.train[0].truncated == (len(expected.input_ids) < len(whole[2].input_ids))
    with pytest.raises(UserError, match="none of its 2 rows.*max_length"):
        loaded(tmp_path, path, template=made, max_length=max(8, len(whole[0].input_ids) - 1), truncation="truncate")
    data = loaded(tmp_path, path, template=made, max_length=len(whole[2].input_ids) - 1, max_invalid_fraction=0.5)
    assert data.report.train[0].dropped and len(data.train) == 1


def test_the_validation_split_is_disjoint_and_repeatable(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*ROWS, *ROWS, *ROWS[:5]])
    made = loaded(tmp_path, path, eval_fraction=0.1)
    sides = [{tuple(store[index].input_ids) for index in range(len(store))} for store in (made.train, made.validation)]
    assert not sides[0] & sides[1] and len(made.train) + len(made.validation) == 85 and 6 <= len(made.validation) <= 11
    assert made.report.duplicates == 45 and made.report.shared == 0
    own = loaded(tmp_path, path, validation=(SourceConfig(dataset=path),))
    assert own.report.shared == 85 and len(own.validation) == 85


def test_wrong_weights_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(UserError, match="sum to"):
        loaded(tmp_path, SourceConfig(dataset=path, weight=0.5), SourceConfig(dataset="builtin:arithmetic", weight=0.4))
    made = loaded(tmp_path, SourceConfig(dataset=path), SourceConfig(dataset="builtin:arithmetic", max_samples=60))
    assert np.bincount(made.train.source_of).tolist() == [40, 60] and "row counts" in made.report.mixture


def test_builtin_heldout_prompts_are_repeatable() -> None:
    found = load_heldout_prompts(SourceConfig(dataset="builtin:arithmetic", split="heldout"), 30, 1, "Be brief.")
    assert len(found) == 30 and all(prompt.ground_truth == prompt.row["gold"] for prompt in found)
    assert [message.role for message in found[0].messages] == ["system", "user"]
    assert found == load_heldout_prompts(
        SourceConfig(dataset="builtin:arithmetic", split="heldout"), 30, 1, "Be brief."
    )
    assert found != load_heldout_prompts(SourceConfig(dataset="builtin:arithmetic"), 30, 1, "Be brief.")


def test_heldout_prompts_may_lack_an_answer(tmp_path: Path) -> None:
    rows: list[Any] = [{"messages": [{"role": "user", "content": f"q{n}"}], "ground_truth": str(n)} for n in range(50)]
    path = write(tmp_path / "a.jsonl", [*rows, "bad"])
    found = load_heldout_prompts(SourceConfig(dataset=path), 10, 0)
    assert len(found) == 10 and all(prompt.messages[0].content == f"q{prompt.ground_truth}" for prompt in found)


@pytest.mark.parametrize(
    ("dataset", "sentence"),
    [
        ("{}/a.json", "no such file; did you mean `a.jsonl`"),
        ("{}/none/a.jsonl", "no folder `none`"),
        ("{}/empty.jsonl", "it is empty"),
        ("{}/notes.txt", "neither JSON lines"),
        ("{}/array.json", "array.json:2: the JSON array is broken"),
        ("{}/cut.jsonl.gz", "cannot be read"),
        ("{}/wide.jsonl", "UTF-16"),
        ("{}/bad.csv", "CSV"),
        ("{}/folder", "no data files"),
        ("{}/words.jsonl", "none of its first rows"),
        ("{}/other.jsonl", "known format"),
        ("missing.jsonl", "no such file"),
        ("./missing", "no such file"),
        ("{}/bad.parquet", "Parquet"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "empty.jsonl").write_text(" \n\n")
    (tmp_path / "notes.txt").write_text("Dear diary")
    (tmp_path / "array.json").write_text('[{"a": 1},\n{"b": }]')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode())[:-30])
    (tmp_path / "wide.jsonl").write_text("{}", encoding="utf-16")
    (tmp_path / "bad.csv").write_bytes(b"question,answer\n\xff,b\n")
    (tmp_path / "words.jsonl").write_text('"a"\n"b"\n')
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=sentence) as caught:
        loaded(tmp_path, dataset.format(tmp_path))
    assert "\n" not in str(caught.value)


def test_settings_of_the_hub_are_refused_for_local_files(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    for fault in ({"split": "test"}, {"config_name": "main"}):
        with pytest.raises(UserError, match="local path"):
            read_source(SourceConfig(dataset=path, **fault), 0)
    with pytest.raises(UserError, match="no split `test`"):
        read_source(SourceConfig(dataset="builtin:arithmetic", split="test"), 0)


def test_names_that_are_not_paths_are_looked_up_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(map(_looks_like_a_path, ("openai/gsm8k", "teknium/OpenHermes-2.5", "org/data-v1.5", "squad")))
    assert all(map(_looks_like_a_path, ("a.jsonl", "b/c.txt", "./x", "/x", "~/x", "a.json.gz", "data.jsn", "x/")))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            ValueError(
                "Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']\nExample"
            ),
            "choose one with `config_name:` .main, socratic",
        ),
        (
            ValueError("BuilderConfig 'x' not found. Available: ['main', 'socratic']"),
            "no configuration `x`; it has main, socratic",
        ),
        (
            ValueError("Unknown split \"dev\". Should be one of ['train', 'test']."),
            "no split `dev`; it has train, test",
        ),
        (
            RuntimeError("Dataset 'a/b' is a gated dataset on the Hub. Visit"),
            "https://huggingface.co/datasets/a/b.*hf auth login",
        ),
        (ConnectionError("Couldn't reach 'a/b' on the Hub (ConnectError)"), "hub cannot be reached|HF_HUB_OFFLINE"),
        (RuntimeError("odd\nthing"), "odd thing"),
    ],
)
def test_errors_of_the_hub_become_one_sentence(error: Exception, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        raise UserError(describe_hub_error(error, "a/b", "x", "dev", "")) from error


def test_a_hub_data_set_offline_is_one_sentence() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match="nobody/nothing: .*(HF_HUB_OFFLINE|hub)"):
        read_source(SourceConfig(dataset="nobody/nothing"), 0)


def test_malformed_files_are_reported(tmp_path: Path) -> None:
    rng = random.Random(0)
    odd = [
        "\ud800",
        "\x00",
        10**400,
        -0.0,
        float("inf"),
        None,
        True,
        [],
        {},
        "a" * 1_000_000,
        "\u2028",
        "<|user|>",
        "</s>",
        "👍🏽",
        " ",
    ]
    rows = [
        {rng.choice(["question", "answer", "gold", "x"]): rng.choice(odd) for _ in range(4)} for _ in range(120)
    ] + ROWS
    rng.shuffle(rows)
    path = write(tmp_path / "a.jsonl", [*rows[:0], {"question": "a", "answer": "b"}, *rows])
    made = loaded(tmp_path, path, max_invalid_fraction=1.0)
    report = made.report.train[0]
    assert report.used + report.num_dropped == report.read == 161 and report.used >= 41


COUNTS = {
    "gsm8k/train.jsonl.gz": (5000, 5000, 5000),
    "math/test.jsonl.gz": (2500, 2500, 2500),
    "llamafactory_demos/alpaca_en_demo.json.gz": (999, 999, 2),
    "llamafactory_demos/glaive_toolcall_en_demo.json.gz": (300, 300, 0),
    "rasbt_instruction/instruction-data.json": (1100, 1100, None),
    "open_instruct_samples/sft_sample.jsonl.gz": (100, 100, None),
    "numinamath_cot_1k/train_first1000.jsonl.gz": (1000, 1000, None),
    "hub_samples/MetaMathQA.jsonl": (3, 3, 3),
    "hub_samples/OpenMathInstruct-2.jsonl": (3, 3, 3),
    "hub_samples/ultrachat_200k.jsonl": (1, 1, 0),
    "hub_samples/orca-math-word-problems-200k.jsonl": (2, 2, 0),
    "hub_samples/NuminaMath-CoT.jsonl": (1, 1, 1),
    "svamp/SVAMP.json": (1000, 1000, 1000),
}


@pytest.mark.parametrize("name", COUNTS)
def test_real_rows_are_used_or_have_a_reason(name: str) -> None:
    if not (SHARED / "data" / name).exists():
        pytest.skip("needs ../shared")
    columns = {"instruction": "Body", "input": "Question", "output": "Answer"} if "svamp" in name else {}
    source = SourceConfig(dataset=str(SHARED / "data" / name), columns=columns)
    rows = read_source(source, 0)
    shape = format_of(source, rows)
    good = []
    faults = []
    for _, row in rows:
        try:
            good.append(conversation_of(row, source, shape, None))
        except InvalidRow as fault:
            faults.append(fault.reason)
    read_count, used, golds = COUNTS[name]
    assert (len(rows), len(good) + len(faults), len(good)) == (read_count, read_count, used)
    assert all(faults)
    assert golds is None or sum(talk.ground_truth is not None for talk in good) == golds
    assert all("," not in str(talk.ground_truth) for talk in good) or "gsm8k" not in name
