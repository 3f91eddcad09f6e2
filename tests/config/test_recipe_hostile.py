"""Malformed files: each ends quickly in a ConfigError with the file and line, and in no other exception."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from malformed_yaml import MAX_CPU_SECONDS

from lowrank_tune.config import load
from lowrank_tune.errors import ConfigError

GOOD = b"algorithm: sft\ndata: {train: [{dataset: builtin:arithmetic}]}\ntrain: {max_steps: 5}\n"
BOMB = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n".encode() for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)

HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", ":1: is empty"),
    "blank": (b"\n\n  \n", ":1: is empty"),
    "comment only": (b"# nothing\n", ":1: is empty"),
    "null": (b"~\n", ":1: is not a recipe"),
    "list": (b"- algorithm: sft\n", ":1: is not a recipe"),
    "word": (b"\nsft\n", ":2: is not a recipe"),
    "number": (b"17", ":1: is not a recipe"),
    "two documents": (GOOD + b"---\nseed: 1\n", ":4: a second document begins"),
    "directive": (b"%YAML 1.1\n---\n" + GOOD, "has a YAML directive"),
    "tag directive": (b"%TAG ! tag:x,2000:\n---\n" + GOOD, "has a YAML directive"),
    "endless version": (b"%YAML 1." + b"1" * 5000 + b"\n---\n" + GOOD, "is not YAML"),
    "anchor": (GOOD + b"seed: &s 1\n", ":4: seed: has an anchor (&s)"),
    "alias": (GOOD + b"seed: *s\n", ":4: seed: has an alias (*s)"),
    "alias bomb": (BOMB, ":1: a: has an anchor"),
    "self reference": (b"a: &a [*a]\n", "has an alias"),
    "alias as key": (b"*a : 1\n", "an alias cannot be a key"),
    "merge key": (GOOD + b"<<: {seed: 1}\n", ":4: <<: is a merge key; use `extends`"),
    "python tag": (GOOD + b"seed: !!python/object/apply:os.system ['true']\n", ":4: seed: has a tag"),
    "python name": (b"!!python/name:os.system\na: 1\n", "has a tag"),
    "own tag": (GOOD + b"seed: !secret 1\n", ":4: seed: has a tag"),
    "string tag": (GOOD + b"seed: !!str 1\n", ":4: seed: has a tag"),
    "binary tag": (GOOD + b"seed: !!binary aGk=\n", ":4: seed: has a tag"),
    "bare tag": (GOOD + b"seed: ! 1\n", ":4: seed: has a tag"),
    "twice": (GOOD + b"seed: 1\nname: x\nseed: 2\n", ":6: seed: is written twice; the first is on line 4"),
    "twice below": (b"train:\n  max_steps: 1\n  max_steps: 2\n", ":3: train.max_steps: is written twice"),
    "twice in braces": (b"train: {max_steps: 1, max_steps: 2}\n", ":1: train.max_steps: is written twice"),
    "deep lists": (b"a: " + b"[" * 5000, "is nested more than 20 levels"),
    "deep lists closed": (b"a: " + b"[" * 900 + b"]" * 900, "is nested more than 20 levels"),
    "deep braces": (b"{a: " * 5000, "is nested more than 20 levels"),
    "deep blocks": (b"".join(b" " * n + b"a:\n" for n in range(300)), "is nested more than 20 levels"),
    "deep dashes": (b"- " * 5000, "is nested more than 20 levels"),
    "question marks": (b"? " * 5000, ""),
    "huge": (b"# " + b"x" * 300_000, "has 300,002 bytes, and a recipe has at most 262,144"),
    "many keys": (b"".join(f"k{n}: {n}\n".encode() for n in range(900)), "unknown key"),
    "many values": (b"a: [" + b"1," * 20_000 + b"]", "has more than 2,000 values"),
    "long word": (b"name: " + b"x" * 100_000, ":1: name: may have letters"),
    "long number": (GOOD + b"seed: " + b"9" * 50_000, ":4: seed: expected a whole number"),
    "long decimal": (GOOD + b"seed: 0." + b"1" * 5000, ":4: seed: expected a whole number"),
    "huge exponent": (
        b"algorithm: sft\ndata: {train: [{dataset: builtin:arithmetic}]}\ntrain: {max_steps: 1e999999999}\n",
        ":3: train.max_steps: ",
    ),
    "tab indent": (b"train:\n\tmax_steps: 1\n", ":2: is indented with a tab"),
    "tab after colon": (b"seed:\t1\n", ":1: is not YAML"),
    "latin 1": (b"name: caf\xe9\n", ":1: is not UTF-8"),
    "overlong": (b"seed: 1\nname: \xc0\xaf\n", ":2: is not UTF-8"),
    "utf 16": ("seed: 1\n".encode("utf-16"), ":1: is not UTF-8"),
    "nul": (b"seed: 1\nname: a\x00b\n", ":2: contains a control character"),
    "bell": (b"name: a\x07b\n", ":1: contains a control character"),
    "escaped nul": (GOOD + b'name: "a\\0b"\n', ":4: name: contains a control character"),
    "surrogate": (GOOD + b'name: "\\ud800"\n', ":4: name: contains half of a surrogate"),
    "surrogate key": (GOOD + b'"\\ud800": 1\n', ":4: "),
    "no character": (GOOD + b'name: "\\UFFFFFFFF"\n', "is not YAML"),
    "open quote": (b'name: "abc\n', "is not YAML"),
    "open brace": (b"train: {max_steps: 1\n", "is not YAML"),
    "closing only": (b"]\n", ":1: is not YAML"),
    "bad indent": (b"train:\n    max_steps: 1\n  save_total_limit: 2\n", ":3: is not YAML"),
    "no colon": (b"seed: 1\nname\n", ":2: is not YAML"),
    "two colons": (b"a: b: c\n", ":1: is not YAML"),
    "mapping as key": (b"{a: 1}: 2\n", "a key must be a word"),
    "list as key": (b"? [a]\n: 2\n", "a key must be a word"),
    "number as key": (GOOD + b"1: 2\n", ":4: a key must be a word, and `1` is not one"),
    "null as key": (GOOD + b"~: 2\n", ":4: a key must be a word, and `~` is not one"),
    "sexagesimal": (GOOD + b"seed: 1:30\n", ":4: seed: expected a whole number, found '1:30'"),
    "octal": (GOOD + b"seed: 010\n", ":4: seed: expected a whole number, found '010'"),
    "underscore": (GOOD + b"seed: 1_000\n", ":4: seed: expected a whole number, found '1_000'"),
    "hexadecimal": (GOOD + b"seed: 0x10\n", ":4: seed: expected a whole number, found '0x10'"),
    "timestamp": (GOOD + b"seed: 2026-01-01\n", ":4: seed: expected a whole number, found '2026-01-01'"),
    "no as number": (GOOD + b"seed: no\n", ":4: seed: expected a whole number, found 'no'"),
    "true as number": (GOOD + b"seed: true\n", ":4: seed: expected a whole number, found true"),
    "json nan": (GOOD + b"seed: .nan\n", ":4: seed: expected a whole number"),
    "escape codes": (GOOD + b'"\\e[2J": 1\n', ":4: "),
    "right to left": (GOOD + "\u202egnp: 1\n".encode(), "\\u202egnp"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_malformed_file_ends_in_problems_with_lines(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    raw, message = HOSTILE[case]
    Path("bad.yaml").write_bytes(raw)
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load("./bad.yaml")
    seconds = time.process_time() - start
    lines = str(caught.value).splitlines()
    assert all(line.startswith("bad.yaml") for line in lines)
    assert len(lines) == len(caught.value.problems) <= 51
    assert any(message in line for line in lines), lines
    assert all(len(line) < 400 and line.isprintable() for line in lines)
    assert seconds < MAX_CPU_SECONDS, f"{seconds:.2f} s"


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("1e-5", 1e-5),
        ("2e-4", 2e-4),
        ("1.0e-5", 1e-5),
        ("1E3", 1000.0),
        ("5", 5.0),
        ("+0.5", 0.5),
        (".5", 0.5),
        ("1.", 1.0),
        ("2e+2", 200.0),
    ],
)
def test_plain_word_is_a_number_of_yaml_1_2(word: str, value: float, tmp_path: Path) -> None:
    file = tmp_path / "good.yaml"
    file.write_bytes(
        b"\xef\xbb\xbf---\n"
        + GOOD.replace(b"steps: 5", b"steps: 5, learning_rate: " + word.encode()).replace(b"\n", b"\r\n")
    )
    assert load(str(file)).train.learning_rate == value


def test_plain_word_of_yaml_1_1_is_text(tmp_path: Path) -> None:
    file = tmp_path / "good.yaml"
    words = ["no", "yes", "on", "off", "y", "12:30", "010", "0x1F", "2026-01-01", "1_000", "True", "=", "nan"]
    file.write_bytes(GOOD + f"adapters: {{policy: {{target_modules: [{', '.join(words)}]}}}}\n".encode())
    assert load(str(file)).adapters["policy"].target_modules == tuple(words)
