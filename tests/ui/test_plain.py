"""The plain log: readable lines, no escape codes in a pipe, harmless text of models."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import shlex
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from run_summaries import DONE_SUMMARY

from lowrank_tune.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    GroupLogged,
    LogMessage,
    Progress,
    RunEnded,
    RunStarted,
    SampleLogged,
    StepEnd,
)
from lowrank_tune.ui import escape_control_chars
from lowrank_tune.ui.formatting import EtaEstimator, clock, format_large, format_stats
from lowrank_tune.ui.terminal.plain import LineLogger
from lowrank_tune.ui.views.summary import summary_table

STATS = {"loss": 1.234, "learning_rate": 2e-4, "grad_norm": 0.83, "memory_gib": 1.2}
HOSTILE = [
    "\x1b[2J\x1b]52;c;eA==\x07",
    "\x1b]8;;http://x\x1b\\y",
    "a\rb\nc\x85d\u2028e",
    "\u202eabc\u2066",
    "\ud800",
    "é 中 \U0001f600",
    "\x9b31m",
    "x" * 1_000_000,
]


class Screen(io.StringIO):
    """A terminal in memory."""

    def isatty(self) -> bool:
        return True


def step(
    number: int, time: float = 0.0, seconds: float = 2.0, steps: int = 150, logged: bool = True, **stats: float
) -> StepEnd:
    return StepEnd(
        step=number, steps=steps, stats=stats or STATS, seconds=seconds, tokens=10_240, logged=logged, time=time
    )


def shown(*events: Event, file: io.StringIO | None = None, **environ: str) -> str:
    file = file or io.StringIO()
    sink = LineLogger(file, environ)
    for event in events:
        sink(event)
    sink.close()
    return file.getvalue()


EVENTS: list[Event] = [
    RunStarted(
        name="demo",
        algorithm="sft",
        model="tiny-tutor",
        roles={"policy": ["policy"]},
        reference="the base",
        steps=150,
        resumed_from=10,
        trainable=98304,
        device="cpu",
    ),
    Progress(description="tokenizing", done=250, total=500),
    Progress(description="tokenizing", done=500, total=500),
    step(12),
    Evaluated(step=12, stats={"loss": 1.1, "accuracy": 0.61}, best=True),
    SampleLogged(step=12, prompt="7 + 5?", completion="It is 12.", finish_reason="stop", ground_truth="12", reward=1.0),
    CheckpointSaved(step=12, path="/somewhere/checkpoints/step-12", seconds=0.2),
    LogMessage(message="3 rows dropped\nsee above", level="warning"),
    LogMessage(message="a fact"),
    RunEnded(status="done", step=150, seconds=83.0),
]


def test_line_logger_prints_a_complete_run() -> None:
    assert shown(*EVENTS).splitlines() == [
        "run demo: sft of tiny-tutor on cpu, 150 steps, 98,304 trained parameters",
        "  policy: policy",
        "  reference: the base",
        "  continued after step 10",
        "tokenizing: 500/500 (100 %)",
        "step  12/150  loss 1.234  lr 2.0e-04  grad 0.830  tokens/s 5,120  memory 1.2 GiB  ETA 4:36",
        "validation after step 12  loss 1.100  accuracy 61.0 %  best so far",
        "  7 + 5? -> It is 12.  [stop, gold 12, reward 1.000]",
        "saved step-12 (0.2 s)",
        "warning: 3 rows dropped",
        "  see above",
        "a fact",
        "done after step 150 in 1:23",
    ]


def test_line_logger_prints_logged_steps_with_the_speed_of_all() -> None:
    lines = shown(
        step(1, logged=False, seconds=1.0), step(2, logged=False, seconds=1.0), step(3, seconds=3.0)
    ).splitlines()
    assert len(lines) == 1 and "tokens/s 6,144" in lines[0]  # 3 * 10,240 in 5 s
    # a speed that the event contains is preferred
    assert "tokens/s 7 " in shown(step(1, tokens_per_second=7.0))


def test_statistics_are_printed_in_a_fixed_order() -> None:
    stats = {
        "zeta": 0.5,
        "memory_gib": 2.0,
        "kl": 0.00012,
        "loss": math.nan,
        "skipped_steps": 0.0,
        "updated_param_fraction": 0.5,
        "update_ratio": 1.5e-3,
    }
    assert format_stats(stats) == "loss nan  kl 1.20e-04  update 1.5e-03  moved 50.0 %  zeta 0.500  memory 2.0 GiB"
    assert format_stats({"skipped_steps": 2.0}) == "skipped 2"
    assert format_stats({"overflowed_steps": 2.0, "loss_scale": 32768.0}) == "overflowed 2"
    assert (
        format_stats({"\x1b[2J": 1.0, "big": 1e7, "none": 0.0, "inf": math.inf})
        == "\\x1b[2J 1.000  big 1.00e+07  none 0.000  inf inf"
    )


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "999"), (1000, "1 k"), (98_304, "98.3 k"), (999_499, "999 k"), (999_500, "1 M"), (1_234_567, "1.23 M")],
)
def test_large_counts_have_three_digits(count: int, text: str) -> None:
    assert format_large(count) == text


def test_a_line_of_preference_metrics() -> None:
    stats = {
        "loss": 0.6,
        "accuracy": 0.75,
        "margin": 0.5,
        "rewards/chosen": 0.1,
        "rewards/rejected": -0.4,
        "logps_per_token/chosen": -1.0,
        "logps_per_token/rejected": -2.0,
        "logps/chosen_delta": -0.01,
        "kl": 0.02,
        "learning_rate": 1e-4,
    }
    assert (
        format_stats(stats)
        == "loss 0.600  accuracy 75.0 %  margin +0.500  chosen +0.100  rejected -0.400  kl 0.020  lr 1.0e-04"
    )
    assert (
        format_stats({"score_rejected": -1.0, "score_chosen": 2.0, "margin": 3.0})
        == "margin +3.000  chosen +2.000  rejected -1.000"
    )


def test_validations_are_printed_with_their_kind_and_step() -> None:
    pairs = {
        "pairs/accuracy": 0.9,
        "pairs/margin": 1.5,
        "pairs/calibration_error": 0.04,
        "pairs/length_correlation": 0.12,
        "pairs/prefers_longer": 0.55,
    }
    assert shown(Evaluated(step=9, stats=pairs)) == (
        "held-out pairs after step 9  accuracy 90.0 %  margin +1.500  calibration error 4.0 %  length correlation "
        "+0.12  "
        "prefers the longer 55.0 %\n"
    )
    answers = {"heldout/my_sft/accuracy": 0.25, "heldout/my_sft/eos_rate": 1.0}
    assert (
        shown(Evaluated(step=9, stats=answers))
        == "held-out answers of my_sft after step 9  accuracy 25.0 %  EOS 100.0 %\n"
    )
    mixed = {"eval_loss": 0.5, "pairs/accuracy": 0.9}
    assert (
        shown(Evaluated(step=9, stats=mixed, best=True))
        == "validation after step 9  loss 0.500  pairs/accuracy 0.900  best so far\n"
    )
    assert shown(Evaluated(step=9, stats={})) == "validation after step 9  \n"


def test_a_line_of_rollout_metrics() -> None:
    stats = {
        "loss": 1e-4,
        "reward_std": 0.25,
        "reward": 0.75,
        "completions/mean_length": 18.04,
        "completions/clipped_ratio": 0.0,
        "rollout_seconds": 0.98765,
        "kl": 0.02,
        "reward_seconds": 0.0006,
        "frac_reward_zero_std": 0.0625,
        "sampling/sampling_logp_difference/mean": 1e-7,
        "entropy": 0.5,
        "clip_ratio": 0.0,
        "learning_rate": 1e-4,
    }
    assert (
        format_stats(stats)
        == "reward 0.750  spread 0.250  kl 0.020  length 18.0  zero std 6.2 %  entropy 0.500  lr 1.0e-04  rollout "
        "1.0 s"
    )
    several = {
        "reward": 0.75,
        "rewards/answer/mean": 0.5,
        "rewards/\x1b[2J/mean": 0.25,
        "completions/clipped_ratio": 0.5,
        "clip_ratio": 0.25,
    }
    assert format_stats(several) == "reward 0.750  answer 0.500  \\x1b[2J 0.250  truncated 50.0 %  clipped 25.0 %"
    group = GroupLogged(
        step=1,
        prompt="1+1?",
        completions=[{"text": "2", "reward": 1.0, "advantage": 0.0, "finish_reason": "stop", "parts": {}}],
    )
    assert shown(group) == ""  # groups have no lines


def test_held_out_answers_of_the_policy() -> None:
    stats = {"heldout/policy/accuracy": 0.5, "heldout/policy/eos_rate": 1.0, "heldout/policy/mean_length": 33.69}
    line = "held-out answers of the policy after step 4  accuracy 50.0 %  EOS 100.0 %  length 33.7  best so far\n"
    assert shown(Evaluated(step=4, stats=stats, best=True)) == line
    mixed = {"eval_loss": 0.5, **stats}
    assert shown(Evaluated(step=4, stats=mixed)) == "validation after step 4  held-out exact 50.0 %  loss 0.500\n"
    final = {"heldout/grpo/accuracy": 0.5, "heldout/grpo/pass_at_8": 1.0}
    assert (
        shown(Evaluated(step=4, stats=final))
        == "held-out answers of grpo after step 4  accuracy 50.0 %  pass@8 100.0 %\n"
    )


def test_a_chain_and_its_pairs_in_lines() -> None:
    start = RunStarted(
        name="x",
        algorithm="reward",
        model="m",
        roles={"reward": ["reward"], "reference": []},
        reference="the base",
        steps=9,
        stage=2,
        stages=3,
    )
    sides = [
        SampleLogged(step=9, prompt="2+2?", completion=text, finish_reason="stop", role=role, reward=reward)
        for text, role, reward in (("four", "chosen", 1.25), ("five", "rejected", -0.5))
    ]
    assert shown(start, *sides, RunEnded(status="done", step=9, seconds=60.0)).splitlines() == [
        "run x, stage 2 of 3: reward of m, 9 steps, 0 trained parameters",
        "  reward: reward",
        "  chosen   2+2? -> four  [score +1.250]",
        "  rejected 2+2? -> five  [score -0.500]",
        "stage 2 of 3 done after step 9 in 1:00",
    ]
    assert shown(replace(start, name="", stages=1)).startswith("run: reward of m, 9 steps")


def test_remaining_time_counts_pauses() -> None:
    pace = EtaEstimator()
    assert pace.seconds_left(step(1, time=102.0, steps=11)) == 20.0  # the seconds of the step itself
    assert pace.seconds_left(step(2, time=104.0, steps=11)) == 18.0
    assert pace.seconds_left(step(3, time=112.0, steps=11)) == 32.0  # 8 s of evaluation: 12 s for 3 steps
    assert pace.seconds_left(step(11, time=200.0, steps=11)) == 0.0
    assert pace.seconds_left(step(5, time=300.0, steps=11)) == 12.0  # started again: only what follows counts
    pace, last = EtaEstimator(), 0.0
    for number in range(1, 101):
        last += 9.0 if number <= 50 else 1.0
        left = pace.seconds_left(step(number, time=last, seconds=1.0, steps=200))
    assert left == 100.0  # the slow first half does not count any more
    assert (clock(42), clock(725.4), clock(11250), clock(-1)) == ("0:42", "12:05", "3:07:30", "0:00")


def progress(*marks: tuple[int, float], total: int = 100) -> list[str]:
    return shown(
        *(Progress(description="loading", done=done, total=total, time=time) for done, time in marks)
    ).splitlines()


def test_progress_in_a_pipe_has_few_lines() -> None:
    assert progress(*((done, done * 0.01) for done in range(101))) == ["loading: 100/100 (100 %)"]
    assert len(progress(*((done, done * 1.0) for done in range(101)))) == 10
    # every minute, and the end
    assert len(progress(*((done, done * 1000.0 / 10_000) for done in range(10_001)), total=10_000)) == 17
    assert progress((0, 0.0), (25, 50.0), (50, 60.0)) == [
        "loading: 25/100 (25 %)  ETA 2:30",
        "loading: 50/100 (50 %)  ETA 0:20",
    ]
    assert progress((0, 0.0), (0, 100.0)) == []
    assert progress((0, 0.0), total=0) == ["loading: 0/0 (100 %)"]
    assert progress((42, 0.0), total=40) == ["loading: 42/42 (100 %)"]  # dropped rows are read as well
    assert progress((100, 0.0), (100, 1.0)) == ["loading: 100/100 (100 %)"] * 2  # the same job once more


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_hostile_text_is_inert(text: str, encoding: str) -> None:
    events: list[Event] = [
        SampleLogged(step=1, prompt=text, completion=text, finish_reason=text, ground_truth=text),
        LogMessage(message=f"{text[:2000]}|", level="warning"),
        RunStarted(
            name=text[:99],
            algorithm="sft",
            model=text[:99],
            roles={text[:99]: [text[:99]]},
            reference=text[:99],
            steps=1,
        ),
        CheckpointSaved(step=1, path=f"x/{text[:99]}", seconds=0.0),
        Progress(description=text[:99], done=1, total=1),
        replace(step(1), stats={text[:99]: 1.0}),
        Evaluated(step=1, stats={text[:99]: 1.0}),
        RunEnded(status="failed", step=1, seconds=0.0, message=text[:99]),
    ]
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    sink = LineLogger(file, {})
    for event in events[:1]:
        sink(event)
    assert raw.getvalue().count(b"\n") == 1 and len(raw.getvalue()) < 2_000_000
    for event in events[1:]:
        sink(event)
    out = raw.getvalue().decode(encoding)
    assert not [
        char for char in out if char != "\n" and (unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or bidi(char))
    ]
    assert all(line and not line.startswith("c") for line in out.splitlines())  # no text begins a new line


def bidi(char: str) -> bool:
    return (
        unicodedata.bidirectional(char) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
        or char in "\u200e\u200f\u061c"
    )


def test_escape_control_chars_escapes_exactly_the_unsafe_characters() -> None:
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or bidi(char):
            assert escape_control_chars(char).isascii() and escape_control_chars(char).startswith("\\"), hex(code)
        elif unicodedata.category(char)[0] in "LMNPS" or char in " \u200c\u200d":
            assert escape_control_chars(char) == char, hex(code)
    assert escape_control_chars("a\tb\x1b\u202e\ud800") == "a\\tb\\x1b\\u202e\\ud800"
    assert escape_control_chars("abcdefgh", 8) == "abcdefgh" and escape_control_chars("abcdefghi", 8) == "abcde..."


def test_no_escape_byte_outside_a_terminal() -> None:
    assert "\x1b" not in shown(*EVENTS, TERM="xterm-256color")
    assert "\x1b" not in shown(*EVENTS, file=Screen(), TERM="dumb")


def test_colors_in_a_terminal_unless_no_color() -> None:
    plain = shown(EVENTS[-3], file=Screen(), TERM="xterm")
    assert plain.startswith("\x1b[33mwarning: 3 rows dropped\x1b[0m\n")
    assert "\x1b" not in shown(EVENTS[-3], file=Screen(), TERM="xterm", NO_COLOR="1")
    bar = shown(*EVENTS[1:3], file=Screen(), TERM="xterm", NO_COLOR="1")
    assert "\x1b[3" not in bar and "\x1b[38" not in bar and "500/500" in bar


def test_bar_shows_the_cursor_at_its_end() -> None:
    for events in (
        EVENTS[1:3],
        [EVENTS[1], step(1)],
        [EVENTS[1]],
        [EVENTS[1], Progress(description="other", done=0, total=3)],
    ):
        out = shown(*events, file=Screen(), TERM="xterm")
        assert out.count("\x1b[?25l") == out.count("\x1b[?25h") > 0 and out.rfind("\x1b[?25h") > out.rfind("\x1b[?25l")
        assert "tokenizing" in out
    out = shown(EVENTS[1], step(1), file=Screen(), TERM="xterm")
    assert out.index("\x1b[?25h") < out.index("loss 1.234")  # the line is below the bar


def test_a_bar_is_drawn_at_most_ten_times_a_second() -> None:
    out = shown(
        *(Progress(description="x", done=done, total=1000, time=done / 1000) for done in range(1001)),
        file=Screen(),
        TERM="xterm",
    )
    assert out.count("1000/1000") >= 1 and out.count("/1000") < 20


def test_a_real_pipe_and_a_real_terminal() -> None:
    program = (
        "from lowrank_tune.events import *; from lowrank_tune.ui.terminal.plain import LineLogger; import sys; sink = "
        "LineLogger()\n"
        "for n in (0, 1, 2): sink(Progress(description='loading', done=n, total=2))\n"
        "sink(LogMessage(message='w', level='warning')); sink.close(); assert 'torch' not in sys.modules"
    )
    environ = {**os.environ, "TERM": "xterm", "PYTHONUTF8": "1"}
    environ.pop("NO_COLOR", None)
    piped = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environ, check=True)
    assert piped.stdout.splitlines() == [b"loading: 2/2 (100 %)", b"warning: w"] and not piped.stderr
    mine, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", program], stdout=theirs, env=environ, check=True)
    os.close(theirs)
    seen = os.read(mine, 100_000)
    os.close(mine)
    assert b"2/2" in seen and b"\x1b[33mwarning: w" in seen and seen.rfind(b"\x1b[?25h") > seen.rfind(b"\x1b[?25l")


def test_summary_has_the_status_and_the_folder(tmp_path: Path) -> None:
    for name in ("final", "events.jsonl"):
        (tmp_path / name).mkdir()
    summary = {
        "status": "done",
        "step": 150,
        "seconds": 83.0,
        "last": {"loss": 1.0},
        "best": {"loss": 0.9, "step": 120},
        "heldout": {"base": 0.04, "sft": {"accuracy": 0.31, "eos_rate": 0.95}},
        "warnings": ["\x1b[2J"],
    }
    text = summary_table(summary, tmp_path)
    assert text.splitlines() == [
        "status     done",
        "step       150",
        "seconds    1:23",
        "last       loss 1.000",
        "best       loss 0.900  (step 120)",
        "held-out exact answers",
        "  base         4.0 %",
        "  sft          accuracy 31.0 %  eos_rate 95.0 %",
        "warning    \\x1b[2J",
        f"in         {tmp_path}",
        "  final            the adapter, to load, merge or export",
        "  events.jsonl     everything that was measured",
        "next",
        f"  lowrank-tune chat {tmp_path}              chat with it",
        f"  lowrank-tune eval {tmp_path}              answer held-out questions",
        f"  lowrank-tune merge {tmp_path}             merge it into its base",
        f"  lowrank-tune export {tmp_path} --to gguf  write it for llama.cpp",
        f"  lowrank-tune report {tmp_path}            write report.html again",
    ]
    assert summary_table({}, tmp_path / "absent") == f"status     unknown\nin         {tmp_path / 'absent'}"


def test_the_next_commands_are_those_for_what_was_trained() -> None:
    def commands(**summary: Any) -> list[str]:
        lines = summary_table(summary, Path("my runs/x")).splitlines()
        return [line.split()[1] for line in lines if line.startswith("  lowrank-tune") and "'my runs/x'" in line]

    assert commands(status="done", algorithm="reward") == ["score", "report"]
    stages = [{"name": "a", "algorithm": "sft"}, {"name": "b", "algorithm": "reward"}]
    assert commands(status="done", stages=stages) == ["chat", "eval", "merge", "export", "report"]
    assert commands(status="interrupted", algorithm="sft") == ["run"]
    assert commands(status="failed", algorithm="sft") == commands(algorithm="sft") == []


def test_an_interrupted_run_names_the_command_that_continues_it() -> None:
    lines = summary_table({"status": "interrupted", "algorithm": "sft"}, Path("my runs/x")).splitlines()
    command = lines[-1].partition("  continue it")[0].strip()
    assert shlex.split(command) == ["lowrank-tune", "run", "my runs/x/recipe.yaml", "--out", "my runs/x"]


def test_the_next_commands_compare_with_the_newest_earlier_run(tmp_path: Path) -> None:
    summary = {"status": "done", "algorithm": "sft"}
    run = tmp_path / "third"
    assert "lowrank-tune compare" not in summary_table(summary, run)
    for at, name in enumerate(("first", "second", "third", "not-done")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
        os.utime(tmp_path / name / "run.json", (at, at))
        status = "interrupted" if name == "not-done" else "done"
        (tmp_path / name / "summary.json").write_text(json.dumps({**DONE_SUMMARY, "status": status}))
    assert f"lowrank-tune compare {tmp_path / 'second'} {run}" in summary_table(summary, run)


@pytest.mark.parametrize("width", [40, 80, 120, None])
def test_next_commands_are_never_broken(width: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # `make demo` leaves runs in the folder of the repository, and an earlier run adds a command.
    monkeypatch.chdir(tmp_path)
    run = Path("runs/a-name-of-forty-characters-and-some-more")
    lines = summary_table({"status": "done", "algorithm": "sft"}, run, width).splitlines()
    lines = lines[lines.index("next") + 1 :]
    commands = [line for line in lines if "lowrank-tune" in line]
    assert len(commands) == 5 and all(str(run) in command for command in commands)
    assert any(line.startswith(f"  lowrank-tune export {run} --to gguf") for line in commands)
    if width == 80:
        assert max(map(len, lines)) < width and lines[1] == "      chat with it"
    if width is None:
        assert len(lines) == 5


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_summary_is_broken_between_values_and_words(width: int) -> None:
    last = {"loss": 0.92, "kl": 0.01, "entropy": 0.2, "learning_rate": 5e-4, "grad_norm": 0.6, "accuracy": 0.8}
    warning = "a/long-path/to/some_rows.jsonl (alpaca): 59 of 60 rows, 7071 tokens; dropped 1: malformed JSON (line 7)"
    summary = {"status": "interrupted", "last": last | {"step": 3}, "warnings": [warning]}
    whole, folded = (summary_table(summary, Path("runs/x"), size) for size in (None, width))
    assert folded.split() == whole.split()
    assert max(len(line) for line in folded.splitlines() if "lowrank-tune" not in line) <= width
    for part in whole.splitlines()[1].split("  "):
        assert part in folded  # `accuracy 80.0 %` is in one row


def test_summary_of_pairs_and_of_a_chain(tmp_path: Path) -> None:
    pairs = {"accuracy": 0.93, "calibration_error": 0.041, "length_correlation": -0.2}
    figures = "accuracy 93.0 %  calibration error 4.1 %  length correlation -0.20"
    lines = summary_table({"status": "interrupted", "heldout_pairs": pairs}, tmp_path).splitlines()
    assert lines[:-2] == ["status     interrupted", "held-out pairs", f"  {figures}", f"in         {tmp_path}"]
    for name in ("1-sft", "report.html"):
        (tmp_path / name).mkdir()
    stages = [
        {
            "name": "sft",
            "folder": "1-sft",
            "algorithm": "sft",
            "status": "done",
            "step": 96,
            "steps": 96,
            "seconds": 70.0,
            "last": {"loss": 0.4},
            "best": {"loss": 0.2, "step": 54},
        },
        {
            "name": "dpo",
            "folder": "2-dpo",
            "algorithm": "dpo",
            "status": "interrupted",
            "step": 3,
            "steps": 68,
            "heldout_pairs": pairs,
        },
    ]
    summary = {
        "status": "interrupted",
        "algorithm": "sft -> dpo",
        "seconds": 90.0,
        "stages": stages,
        "heldout": {"base": 0.016, "sft": 0.46},
        "warnings": ["dpo: careful"],
    }
    assert summary_table(summary, tmp_path).splitlines()[:-2] == [
        "status     interrupted",
        "seconds    1:30",
        "sft        sft: done, step 96 of 96 in 1:10",
        "  last       loss 0.400",
        "  best       loss 0.200  (step 54)",
        "dpo        dpo: interrupted, step 3 of 68",
        "held-out exact answers",
        "  base         1.6 %",
        "  sft          46.0 %",
        "held-out pairs",
        f"  dpo          {figures}",
        "warning    dpo: careful",
        f"in         {tmp_path}",
        "  1-sft            stage sft: its own run folder, with its adapter in final",
        "  report.html      curves, samples and warnings, for a browser",
    ]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_summary_is_inert(text: str, tmp_path: Path) -> None:
    stage = {
        "name": text,
        "folder": text,
        "algorithm": text,
        "status": text,
        "step": text,
        "steps": 1,
        "seconds": text,
        "last": {text: 1.0},
        "best": text,
        "heldout_pairs": {text: 1.0},
    }
    summary = {
        "status": text,
        "stages": [stage, text, 1],
        "heldout": {text: 0.5, "x": {text: 0.5}},
        "heldout_pairs": text,
        "warnings": [text, 3],
    }
    for each in (summary, {**summary, "stages": text, "heldout_pairs": {text: 1.0}, "warnings": text}):
        out = summary_table(each, tmp_path)
        assert not [
            char
            for char in out
            if char != "\n" and (unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or bidi(char))
        ]
        assert all(line and not line.startswith("c") for line in out.splitlines())
