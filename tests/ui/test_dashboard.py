"""The dashboard as a function of events: recorded runs at several sizes, small and odd screens, hostile text, a resumed
run."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from malformed_yaml import HOSTILE_TEXTS, is_inert

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
    from_json,
)
from lowrank_tune.ui.state import MAX_POINTS, Series, State
from lowrank_tune.ui.terminal.chart_pane import FRONTIER, chart_pane
from lowrank_tune.ui.terminal.help_pane import NOTES
from lowrank_tune.ui.terminal.navigation import handle_key
from lowrank_tune.ui.terminal.panes import KEYS, View
from lowrank_tune.ui.terminal.render import render
from lowrank_tune.ui.terminal.screenshot import screenshot, state_at_step
from lowrank_tune.ui.terminal.text_layout import fit, plain_text, to_ansi, width_of, wrap

HERE = Path(__file__).parents[1]


def recorded(name: str) -> list[Event]:
    lines = (HERE / "recorded" / f"{name}.jsonl").read_text().splitlines()
    return [event for line in lines if (event := from_json(json.loads(line)))]


RECORDED, DPO, REWARD, GRPO = (recorded(name) for name in ("demo", "dpo", "reward", "grpo"))
START = RunStarted(
    name="x", algorithm="sft", model="m", roles={"policy": ["policy"]}, reference="the base", steps=100, time=0.0
)


def state_after(events: list[Event]) -> State:
    state = State()
    for event in events:
        state.apply(event)
    return state


def steps(count: int, first: int = 1, start_time: float = 0.0, **stats: float) -> list[Event]:
    return [
        StepEnd(
            step=step,
            steps=100,
            stats=stats or {"loss": 1 / step, "kl": 0.1},
            seconds=1.0,
            tokens=50,
            time=start_time + step,
        )
        for step in range(first, first + count)
    ]


def up_to(events: list[Event], step: int) -> list[Event]:
    return events[
        : next(index for index, event in enumerate(events) if isinstance(event, StepEnd) and event.step == step)
    ]


def middle() -> list[Event]:
    """The recorded SFT run until its step 60."""
    return up_to(RECORDED, 60)


def chain() -> list[Event]:
    """The recorded SFT run as the first stage of a chain, then the recorded DPO run, which was a second stage."""
    return [replace(event, stage=1, stages=2) if isinstance(event, RunStarted) else event for event in RECORDED] + DPO


def lines_of(state: State, view: View, width: int = 80, height: int = 24) -> list[str]:
    """The rows of the dashboard, each run of blanks replaced by one blank."""
    return [" ".join(line.split()) for line in plain_text(render(state, view, width, height)).splitlines()]


def assert_rows(rows: list[str], *wanted: str) -> None:
    """Each text is in a row, in this order; several may be in one row."""
    position = 0
    for text in wanted:
        found = next((index for index in range(position, len(rows)) if text in rows[index]), None)
        assert found is not None, f"no {text!r} from row {position} on in:\n" + "\n".join(rows)
        position = found


@pytest.mark.parametrize(
    ("name", "events", "width", "height", "view"),
    [
        ("starting", RECORDED[:3], 80, 24, View()),
        ("running", middle(), 120, 40, View()),
        ("chain", [*chain()[: len(RECORDED)], *up_to(DPO, 50)], 120, 40, View()),
        ("ascii", middle(), 80, 24, View(ascii_only=True)),
    ],
)
def test_snapshots(name: str, events: list[Event], width: int, height: int, view: View) -> None:
    """SNAPSHOTS=1 writes them again; read the differences before a commit."""
    shown = plain_text(render(state_after(events), view, width, height))
    file = HERE / "snapshots" / f"dashboard_{name}.txt"
    if os.environ.get("SNAPSHOTS"):
        file.write_text(shown, encoding="utf-8")
    assert shown == file.read_text(encoding="utf-8")


def test_a_screen_of_80_columns_has_two_charts_and_lines_for_the_rest() -> None:
    rows = lines_of(state_after(middle()), View())
    assert_rows(
        rows,
        "lowrank-tune demo \u00b7 sft of tiny-tutor \u00b7 CPU, 2 threads, fp32 running",
        "policy = base + policy reference = the base, adapters off",
        "step 59/96 (61 %) ETA 0:17 for 0:42 1,851 tokens/s",
        "0.6 of 23.5 GiB time evaluating 56% training 43%",
        "loss 0.122 validation 0.183 KL to the reference 1.11",
        "1.5 \u2502",
        "1.0 \u2502",
        "0.5 \u2502",
        "0 \u2502",
        "1 59 1 55",
        "grad 0.072 lr 6.8e-04 accuracy 95.9 % entropy 0.150",
        "ok all good: loss 0.454 -> 0.171, validation 0.243 -> 0.183",
        "question 1 of 4 ",
        "held-out exact: base 1.6 %",
        "What is 6 * 33?",
        "base 6*30=180, 6*3=18, 180+18=198. So it is 198.\u23ce 6*30=180, [cut off]",
        "step 54 6*30=180, 6*3=18, 180+18=198. So it is 198. [gold 198]",
        "\u2500\u2500 log \u2500\u2500",
        "0:41 saved step 54",
        "0:40 validation after step 54: loss 0.183 accuracy 92.7 % best so far",
    )
    assert rows[-1] == "q quit p pause s save e eval n next l log a answers y log scale ? help"


def test_a_finished_run_shows_its_end_and_its_best_step() -> None:
    rows = lines_of(state_after(RECORDED), View(), 120, 40)
    assert_rows(
        rows,
        "fp32 done in 1:",
        "step 96/96 (100 %)",
        "loss 0.402 validation 0.193 KL to the reference 1.73 gradient norm 0.377",
        "learning rate 5.4e-07 accuracy 86.4 % validation 92.7 % entropy 0.450",
        "! validation loss rises since step 54 (0.183 -> 0.193): overfitting; step 54 has the lowest so far",
        "question 1 of 4",
        "0:58 final/ is the adapter of step 54, which had What is 6 * 33?",
        "the lowest validation loss base 6*30=180, 6*3=18, 180+18=198. So it is 198.\u23ce 6*30=180,",
        "0:58 saved step 96 [cut off]",
        "step 96 6*30=180, 6*3=18, 180+18=198. So it is 198. [gold 198]",
        "Dora buys 9 bags of 52 marbles.",
    )
    assert not any("ETA" in row for row in rows)
    assert rows[-1] == "q quit p pause s save e eval n next l log a answers y log scale + - smooth ? help"


def test_a_wide_screen_has_all_charts_also_on_a_log_scale() -> None:
    rows = lines_of(state_after(middle()), View(log_scale=True), 200, 60)
    assert_rows(
        rows,
        "loss log 0.122 validation 0.183 KL to the reference log 1.11 gradient norm log 0.072",
        "2 \u2502",
        "1 \u2502",
        "0.1 \u2502",
        "1 59 5 55 1 59",
        "learning rate log 6.8e-04 accuracy log 95.9 % validation 92.7 % entropy log 0.150",
        "1 59 1 59 1 59",
        "ok all good",
        "0:41 saved step 54 What is 6 * 33?",
        "Dora buys 9 bags of 52 marbles. How many marbles does Dora have?",
        "How much is 99 + 84?",
        "Multiply 2 by 72.",
        "step 54 2*70=140, 2*2=4, 140+4=144. So it is 144. [gold 144]",
    )


def test_a_small_screen_has_plain_lines_only() -> None:
    rows = lines_of(state_after(middle()), View(), 59, 14)
    assert rows[:7] == [
        "demo: running",
        "step 59/96, ETA 0:17",
        "loss 0.122",
        "kl 1.11",
        "grad 0.072",
        "lr 6.8e-04",
        "all good: loss 0.454 -> 0.171, validation 0.243 -> 0.183",
    ]
    assert rows[7:] == [""] * 7


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40)])
def test_a_dpo_run_shows_both_rewards_and_the_answers_of_its_reference(width: int, height: int) -> None:
    rows = lines_of(state_after(up_to(DPO, 40)), View(), width, height)
    assert_rows(
        rows,
        "dpo \u00b7 stage 2 of 2: dpo of tiny-tutor"
        + (" \u00b7 CPU, 1 threads, fp32 running" if width == 120 else " running"),
        "policy = base + sft + policy reference = the base with the frozen adapter sft",
        "step 39/68 (57 %) ETA 1:01 for 1:35 899 tokens/s",
        "time training 67% evaluating 19%",
        "loss 0.241 validation 0.276 reward chosen -0.263 rejected -4.52",
    )
    assert_rows(rows, "ok all good: loss 0.617 -> 0.236, validation 0.566 -> 0.276, 85% of the")
    assert_rows(rows, "What is 6 * 33?", "sft 6*30=180, 6*3=18, 180+18=198. So it is 198.", "step 36 6*30=180")
    if width == 80:
        assert_rows(rows, "accuracy 87.5 % kl 0.430 margin 4.25 grad 0.303 lr 4.1e-04", "held-out pairs right")
    else:
        assert_rows(
            rows,
            "accuracy 87.5 % validation 85.0 %",
            "KL to the reference 0.430 log-prob chosen -0.131 rejected -2.35 margin 4.25 validation 3.75",
            "grad 0.303 lr 4.1e-04",
            "1:31 saved step 36",
            "1:29 validation after step 36: loss 0.276",
            "step 36 9*50=450, 9*2=18, 400+18=418. So it is 418. [gold 468]",
        )


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40)])
def test_a_reward_model_shows_pairs_and_their_scores(width: int, height: int) -> None:
    rows = lines_of(state_after(REWARD), View(), width, height)
    assert_rows(
        rows,
        "tiny-reward \u00b7 reward of tiny-tutor",
        "reward = base + reward",
        "step 250/250 (100 %) 2,127 tokens/s",
        "loss 0.410 validation 0.291 accuracy 56.2 % validation 83.0 %",
        "validation loss rises since step 150 (0.284 -> 0.291): overfitting; step",
        "pair 1 of 3 ",
        "held-out pairs right: 84.5 %",
        "Leo has 26 flowers and gets 62 more. How many flowers",
        "chosen +1.434 6+2=8, 20+60=80, 80+8=88. So it is 88.",
        "rejected -2.045 That makes 86.",
    )
    assert rows[0].endswith("done in 3:24") and "reference" not in rows[1]
    if width == 80:
        assert_rows(rows, "margin 1.83 grad 0.686 lr 3.9e-08 score chosen 0.783 rejected -1.05")
    else:
        assert_rows(
            rows, "score chosen 0.783 rejected -1.05", "margin 1.83 validation 2.29 gradient norm 0.686 learning"
        )
        assert_rows(rows, "rejected -2.045", "Add 9 and 25.", "chosen +1.476 9+5=14", "rejected -2.216 Good question.")
        assert_rows(rows, "Finn buys 5 bags of 48 pears.", "chosen +1.787 5*40=200", "rejected -2.316 I do not know.")


def test_the_second_stage_of_a_chain_keeps_earlier_answers_on_80_columns() -> None:
    rows = lines_of(state_after([*chain()[: len(RECORDED)], *up_to(DPO, 50)]), View())
    assert_rows(
        rows,
        "stage 2 of 2: dpo of tiny-tutor",
        "held-out exact: base 1.6 %, sft 46.2 %",
        "base 6*30=180, 6*3=18, 180+18=198. So it is 198.\u23ce 6*30=180, [cut off]",
        "sft 6*30=180, 6*3=18, 180+18=198. So it is 198.",
        "step 48 6*30=180, 6*3=18, 180+18=198. So it is 198. [gold 198]",
    )


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40)])
def test_a_grpo_run_shows_rewards_phases_and_heldout_accuracy(width: int, height: int) -> None:
    rows = lines_of(state_after(up_to(GRPO, 22)), View(), width, height)
    assert_rows(
        rows,
        "grpo \u00b7 stage 2 of 2: grpo of tiny-tutor",
        "step 21/24 (88 %) ETA 0:07 for 0:51 2,084 tokens/s",
        "1.2 of 23.5 GiB step rollout 39% reward 0% update 61%",
        "reward 0.984 \u00b1 0.041 held-out exact, pass@1 100.0 %",
        "1.0 \u2502",
    )
    assert_rows(rows, "ok all good: reward 0.539 -> 0.984, held-out exact 98% -> 100%", "now 100.0 % (pass@1)")
    assert_rows(rows, "log \u2500", "1 warning", "! 0:34 step 14: most groups have equal rewards and")
    assert_rows(rows, "sft 6*30=180, 6*3=18, 180+18=198. So it is 198.", "step 20 6*30=180", "[gold 198]")
    assert "g group" in rows[-1]
    if width == 80:
        assert_rows(rows, "kl 0.012 entropy 0.010 length 31.0 zero std 87.5 % truncated 0.0 %")
    else:
        assert rows[3].endswith("time training 68% evaluating 30%")
        assert_rows(
            rows,
            "100.0 % KL to the reference 0.012",
            "entropy 0.010 completion length 31.0 reward against KL reward exact",
            "1 21 1 21 0 0.052",
            "zero std 87.5 % truncated 0.0 % clipped 0.0 % grad 0.514 lr 5.0e-04 loss 2.5e-4",
        )


def test_the_chart_of_reward_against_kl_has_both_curves() -> None:
    state = state_after(up_to(GRPO, 22))
    lines = chart_pane(state, (FRONTIER,), View(ascii_only=True), 38, 10)
    signs = {(sign, style) for line in lines[1:-1] for text, style in line for sign in text if sign in "*o"}
    assert signs == {("*", "first"), ("o", "second")}
    labels = [plain_text([line]).partition("|")[0].strip() for line in lines[1:-1]]
    assert [label for label in labels if label] == ["1.0", "0.8", "0.6", "0.4"]


def test_a_single_high_kl_does_not_squeeze_the_chart_of_reward_against_kl() -> None:
    """The step is left out and named; the others fill the width."""
    state = state_after([START])
    state.series["reward"] = Series()
    state.series["kl"] = Series()
    for step in range(1, 31):
        state.series["reward"].add(step, step / 30)
        state.series["kl"].add(step, 0.7 if step == 25 else step / 1000)
    lines = chart_pane(state, (FRONTIER,), View(), 60, 10)
    assert plain_text([lines[0]]).rstrip().endswith("  reward  \u25b6 0.700")
    assert plain_text([lines[-1]]).split() == ["0.001", "0.030"]
    narrow = chart_pane(state, (FRONTIER,), View(), 34, 10)
    assert plain_text([narrow[0]]).rstrip().endswith("  reward  \u25b6")


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40)])
def test_the_group_of_a_recorded_run(width: int, height: int) -> None:
    rows = lines_of(state_after(up_to(GRPO, 13)), View(pane="g"), width, height)
    assert rows[4].startswith("\u2500\u2500 group of step 13: 8 completions \u2500")
    assert rows[5:12] == [
        "What is 5 times 94? [gold 470]",
        "reward advantage end completion",
        "1.000 +0.774 stop x5 5*90=450, 5*4=20, 450+20=470. So it is 470.",
        "0.000 -1.291 stop It is 490.",
        "0.000 -1.291 stop 5*90=450, 5*4=20, 450+25=475. So it is 475.",
        "0.000 -1.291 stop It is 489.",
        "mean reward 0.625, from 0.000 to 1.000; 0 of 8 cut off; g or Esc leaves",
    ]
    # nothing else but the title and the keys
    assert not any(rows[12:-1]) and "g group" in rows[-1]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40)])
@pytest.mark.parametrize(("events", "has_group"), [(middle(), False), (up_to(GRPO, 22), True)])
def test_the_help_lists_every_key_and_explains_the_screen(
    events: list[Event],
    has_group: bool,
    width: int,
    height: int,
) -> None:
    rows = lines_of(state_after(events), View(help=True), width, height)
    assert rows[4].startswith("\u2500\u2500 help \u2500")
    others = {"[", "]", "o", "0-9"} if has_group else {"[", "]", "o", "0-9", "g"}
    keys = {key: effect for key, (_, effect) in KEYS.items() if key not in others}
    text = " ".join(rows[5:-1])
    assert all(f"{key} {effect}" in text for key, effect in keys.items())
    assert " ".join(NOTES) in " ".join(text.split())


@pytest.mark.parametrize(
    "events",
    [
        *(RECORDED[:count] for count in (0, 1, 3, 20, 40, 120, len(RECORDED))),
        DPO[:12],
        up_to(DPO, 30),
        DPO,
        REWARD[:10],
        up_to(REWARD, 40),
        REWARD,
        chain(),
        up_to(GRPO, 9),
        GRPO,
    ],
)
def test_every_size_is_filled_exactly(events: list[Event]) -> None:
    state = state_after(events)
    for width in (1, 20, 59, 60, 61, 75, 80, 99, 100, 133, 200, 300):
        for height in (1, 2, 14, 15, 16, 20, 24, 40, 61, 90):
            for view in (
                View(),
                View(help=True, ascii_only=True),
                View(pane="g"),
                View(pane="g", ascii_only=True, sample=3),
            ):
                lines = render(state, view, width, height)
                assert len(lines) == height and all(width_of(line) == width for line in lines)
                assert not view.ascii_only or plain_text(lines).isascii()


def test_hostile_text_is_inert() -> None:
    for text in HOSTILE_TEXTS:
        events = [
            replace(START, name=text, algorithm=text, model=text, roles={text: [text]}, reference=text, device=text),
            *steps(3, **{"loss": 1.0, text: 2.0, f"eval_{text}": 1.0}),
            Progress(description=text, done=1, total=2, time=4.0),
            LogMessage(message=text, time=5.0),
            LogMessage(message=text, level="warning", time=5.0),
            CheckpointSaved(step=3, path=text, seconds=0.1, time=5.0),
            SampleLogged(
                step=0, prompt=text, completion=text, finish_reason="stop", ground_truth=text, role=text, time=6.0
            ),
            SampleLogged(
                step=3, prompt=text, completion=text, finish_reason=text, ground_truth=text, role=text, time=7.0
            ),
            Evaluated(step=3, stats={f"heldout/{text}/accuracy": 0.5, f"eval_{text}": 1.0}, time=8.0),
            Progress(description=text, done=1, total=2),
        ]
        pair = [
            replace(START, algorithm="reward", stage=2, stages=2, time=10.0),
            SampleLogged(
                step=3, prompt=text, completion=text, finish_reason="stop", role="chosen", reward=1.0, time=11.0
            ),
            SampleLogged(step=3, prompt=text, completion=text, finish_reason=text, role="rejected", time=11.0),
            Evaluated(step=3, stats={f"pairs/{text}": 1.0, "pairs/accuracy": 0.5}, time=12.0),
        ]
        later = [
            replace(START, roles={"reference": [text]}, stage=3, stages=3, time=20.0),
            SampleLogged(step=0, prompt=text, completion=text, finish_reason="stop", role="reference", time=21.0),
        ]
        completion = {
            "text": text,
            "reward": 1.0,
            "advantage": 1.0,
            "finish_reason": text,
            "parts": {text: 1.0, "b": 2.0},
        }
        group = [
            GroupLogged(
                step=3,
                prompt=text,
                ground_truth=text,
                time=13.0,
                completions=[completion, {**completion, "reward": text, "parts": text}, text],
            ),
            *steps(3, start_time=13.0, **{"reward": 1.0, f"rewards/{text}/mean": 1.0, "rewards/b/mean": 1.0}),
        ]
        for state in (
            state_after(events),
            state_after([*events, replace(START, algorithm="grpo"), *group]),
            state_after([*events, RunEnded(status="failed", step=3, seconds=1.0, message=text, time=9.0)]),
            state_after([*events, *pair]),
            state_after([*events, *pair, *later]),
        ):
            for width, height, view in (
                (80, 24, View()),
                (120, 40, View()),
                (40, 10, View()),
                (80, 24, View(pane="g")),
            ):
                lines = render(state, view, width, height)
                assert is_inert(plain_text(lines)) and all(width_of(line) == width for line in lines)
                codes = "".join(to_ansi(line, True) for line in lines)
                # no escape codes but those of the colors
                assert is_inert("".join(part.partition("m")[2] for part in ("m" + codes).split("\x1b[")))
                assert plain_text(render(state, replace(view, ascii_only=True), width, height)).isascii()


def test_no_color_disables_colors() -> None:
    codes = "".join(to_ansi(line, False) for line in render(state_after(RECORDED), View(), 120, 40))
    assert "\x1b[3" not in codes and "\x1b[9" not in codes and "\x1b[7m" in codes


def test_shares_of_the_phases_and_the_eta_are_shown() -> None:
    checked, saved = (
        Evaluated(step=4, stats={"eval_loss": 1.0}, time=6.0),
        CheckpointSaved(step=4, path="p", seconds=2.0, time=8.0),
    )
    state = state_after([Progress(description="loading", done=0, total=1, time=-4.0), START, *steps(4), checked, saved])
    assert state.phase_shares() == {"loading": 4 / 12, "training": 4 / 12, "evaluating": 2 / 12, "saving": 2 / 12}
    assert state.seconds_left == 96.0 and state.totals.tokens_per_second == 50.0
    shown = plain_text(render(state, View(), 120, 40))
    assert "ETA 1:36" in shown and "50 tokens/s" in shown and "training 33%" in shown


def test_a_resumed_run_drops_the_steps_that_it_repeats() -> None:
    state = state_after([START, *steps(10), replace(START, resumed_from=6, time=5000.0), *steps(1, 7, 5000.0)])
    assert [step for step, _ in state.series["loss"].points] == [1, 2, 3, 4, 5, 6, 7]
    assert sum(state.phases.values()) <= 8 and "continued after step 6" in plain_text(render(state, View(), 80, 24))


def ended(status: str = "done", step: int = 10, time: float = 11.0) -> RunEnded:
    return RunEnded(status=status, step=step, seconds=10.0, time=time)  # type: ignore[arg-type]


def answered(step: int, completion: str, role: str = "policy", time: float = 10.0, **more: float) -> SampleLogged:
    return SampleLogged(
        step=step, prompt="1+1?", completion=completion, finish_reason="stop", role=role, time=time, **more
    )  # type: ignore[arg-type]


def test_a_new_stage_has_new_curves_and_keeps_earlier_results() -> None:
    first = replace(START, stage=1, stages=2, roles={"policy": ["policy"], "reference": []})
    second = replace(
        START, algorithm="dpo", stage=2, stages=2, roles={"policy": ["sft", "policy"], "reference": ["sft"]}, time=200.0
    )
    before = [
        first,
        answered(0, "three", "reference", 0.0),
        *steps(10, loss=9.0),
        answered(10, "two"),
        Evaluated(step=10, stats={"heldout/sft/accuracy": 0.5, "eval_loss": 1.0}, best=True, time=10.0),
        LogMessage(message="watch out", level="warning", time=10.5),
        ended(),
    ]
    state = state_after(before)
    assert "stage 1 done in 0:10" in plain_text(render(state, View(), 80, 24)) and state.last("loss") == 9.0
    # there may be a day between two stages
    state = state_after([*before, Progress(description="tokenizing", done=1, total=2, time=100.0)])
    shown = plain_text(render(state, View(), 80, 24))
    assert "  loading" in shown and "tokenizing 1/2" in shown and state.ended is None and state.phase_shares() == {}
    state = state_after([*before, Progress(description="tokenizing", done=1, total=2, time=100.0), second])
    assert not state.series and state.step == 0 and state.best_step is state.seconds_left is None
    assert state.phase_shares() == {"loading": 1.0} and state.heldout == {"sft": {"accuracy": 0.5}}
    now = [answered(0, "two!", "reference", 201.0), *steps(3, start_time=201.0, loss=0.7), answered(3, "2", time=205.0)]
    state = state_after([*before, second, *now])
    shown = plain_text(render(state, View(), 120, 40))
    assert (
        "stage 2 of 2: dpo" in shown
        and "sft 50.0 %" in shown
        and "watch out" in shown
        and state.series["loss"].points[0] == (1, 0.7)
    )
    rows = [line.split()[-2:] for line in shown.splitlines() if line.endswith(("three", "two!", "step 3    2"))]
    assert rows == [["base", "three"], ["sft", "two!"], ["3", "2"]]
    assert [model for model, _ in state.earlier["1+1?"]] == ["base", "sft"]
    state.apply(ended("interrupted", time=210.0))
    assert "stage 2 interrupted in 0:10" in plain_text(render(state, View(), 80, 24))


def test_a_resumed_stage_keeps_its_curves() -> None:
    first = replace(START, stage=1, stages=2)
    state = state_after(
        [first, *steps(10), ended("interrupted"), replace(first, resumed_from=6, time=5000.0), *steps(1, 7, 5000.0)]
    )
    assert [step for step, _ in state.series["loss"].points] == [1, 2, 3, 4, 5, 6, 7]


def test_both_sides_of_a_pair_with_their_scores() -> None:
    start = replace(START, algorithm="reward")
    looks = [
        answered(10, "yes", "chosen", reward=0.25),
        answered(10, "no", "rejected", reward=0.5),
        answered(10, "sure", "chosen", reward=2.5),
        answered(10, "never", "rejected", reward=-1.5),
    ]
    shown = plain_text(render(state_after([start, *steps(10), *looks]), View(), 80, 24)).splitlines()
    lines = [" ".join(line.split()) for line in shown]
    assert any("pair 1 of 2" in line and line.endswith("1 of 2 right") for line in lines)
    at = lines.index("chosen +0.250 yes")
    assert lines[at - 1] == "1+1?" and lines[at + 1] == "rejected +0.500 no"
    again = [answered(20, "yes", "chosen", reward=0.75), answered(20, "no", "rejected", reward=0.5)]
    state = state_after([start, *looks, *again, Evaluated(step=20, stats={"pairs/accuracy": 0.875}, time=30.0)])
    assert len(state.pairs) == 2 and "chosen     +0.750  yes" in plain_text(render(state, View(), 80, 24))
    assert "held-out pairs right: 87.5 %" in plain_text(render(state, View(), 80, 24))
    alone = state_after([start, answered(1, "x", "rejected", reward=1.0), answered(1, "y", "chosen", reward=1.0)])
    assert not alone.pairs and "no answers yet" in plain_text(render(alone, View(), 80, 24))


def test_two_sides_share_a_chart_each_in_its_style() -> None:
    state = state_after(
        [replace(START, algorithm="dpo"), *steps(9, **{"rewards/chosen": 1.0, "rewards/rejected": -2.0})]
    )
    lines = chart_pane(state, ("rewards/chosen", "rewards/rejected"), View(log_scale=True, ascii_only=True), 60, 12)
    # no log scale, because one side is below 0
    assert plain_text(lines[:1]) == " reward chosen 1.00 rejected -2.00\n"
    drawn = [(text.strip(), style) for line in lines[1:] for text, style in line if style in ("chosen", "rejected")]
    assert [({*text}, style) for text, style in drawn] == [({"+"}, "chosen"), ({"-"}, "rejected")]


def test_model_names_with_underscores_are_parsed() -> None:
    state = state_after(
        [START, Evaluated(step=0, stats={"heldout/my_sft/accuracy": 0.5, "heldout/my_sft/pass_at_8": 0.75}, time=1.0)]
    )
    assert state.heldout == {"my_sft": {"accuracy": 0.5, "pass_at_8": 0.75}}


def test_long_series_are_shortened_to_means() -> None:
    series = Series()
    for step in range(1, 50_001):
        series.add(step, float("nan") if step % 7 == 0 else step)
    assert len(series.points) <= MAX_POINTS and series.points[-1][0] > 49_000 and series.last == 50_000
    assert all(abs(value - step) < 200 for step, value in series.points if math.isfinite(value))


def test_the_header_shows_the_status() -> None:
    state = state_after(
        [replace(START, stage=2, stages=3, memory_total_gib=24.0), *steps(3, loss=1.0, memory_gib=18.9)]
    )
    shown = plain_text(render(state, View(now=3.0 + 100), 120, 40))
    assert (
        "stage 2 of 3" in shown
        and "no news for 1:40" in shown
        and "18.9 of 24.0 GiB" in shown
        and "reference = the base" in shown
    )
    assert "paused" in plain_text(render(state, View(pending=("paused: p continues",)), 80, 24))
    state.apply(RunEnded(status="interrupted", step=3, seconds=61.0))
    assert "interrupted in 1:01" in plain_text(render(state, View(), 80, 24))


def test_warnings_are_first_and_repeats_are_counted() -> None:
    state = state_after(
        [
            START,
            LogMessage(message="old warning", level="warning", time=1.0),
            *[LogMessage(message="again", level="warning", time=2.0)] * 3,
            *(LogMessage(message=f"news {n}", time=3.0) for n in range(50)),
        ]
    )
    shown = plain_text(render(state, View(), 120, 40))
    assert shown.index("again (x3)") < shown.index("old warning") < shown.index("news 49") < shown.index("news 48")


def test_keys_change_the_view() -> None:
    view = View()
    assert handle_key(view, "y").log_scale and handle_key(view, "?").help and handle_key(view, "n").sample == 1
    assert (
        handle_key(view, "+").smoothing == view.smoothing + 1
        and handle_key(view, "-").smoothing == view.smoothing - 1
        and handle_key(view, "x") is view
    )
    for _ in range(20):
        view = handle_key(view, "+")
    assert "question 2 of 4" in plain_text(render(state_after(RECORDED), replace(view, sample=5), 80, 24))
    assert "pause" not in plain_text(render(state_after(RECORDED), View(owns_run=False), 80, 24))


def test_a_measured_reward_is_drawn() -> None:
    state = state_after([replace(START, algorithm="grpo"), *steps(30, reward=0.5, kl=0.01, loss=0.0, entropy=1.0)])
    assert "reward" in plain_text(render(state, View(), 80, 24))


def wrote(text: str, reward: float, advantage: float, finish: str = "stop", **parts: float) -> dict[str, object]:
    return {
        "text": text,
        "reward": reward,
        "advantage": advantage,
        "finish_reason": finish,
        "parts": parts or {"answer": reward},
    }


def make_group(step: int, *completions: dict[str, object], time: float = 1.0) -> GroupLogged:
    return GroupLogged(step=step, prompt="1+1?", ground_truth="2", completions=list(completions), time=time)


def test_a_group_is_shown_highest_reward_first_and_equal_completions_once() -> None:
    start = replace(START, algorithm="grpo")
    group = make_group(
        7,
        wrote("five", 0.0, -1.0),
        wrote("two", 1.0, 1.0),
        wrote("five", 0.0, -1.0),
        wrote("on and on", -0.5, -2.0, "length"),
    )
    state = state_after([start, make_group(6, wrote("old", 0.0, 0.0)), *steps(6, reward=0.5), group])
    lines = lines_of(state, View(pane="g"))
    at = lines.index("1+1? [gold 2]")
    assert lines[at - 1].startswith("\u2500\u2500 group of step 7: 4 completions") and "old" not in lines
    assert lines[at + 2 : at + 5] == [
        "1.000 +1.000 stop two",
        "0.000 -1.000 stop x2 five",
        "-0.500 -2.000 cut on and on",
    ]
    assert lines[at + 5] == "mean reward 0.125, from -0.500 to 1.000; 1 of 4 cut off; g or Esc leaves"
    zero_std = state_after([start, make_group(1, wrote("x", 1.0, 0.0))])
    assert "no signal: all rewards are equal" in plain_text(render(zero_std, View(pane="g"), 80, 24))


def test_several_rewards_of_a_completion_are_named_and_many_completions_have_pages() -> None:
    start = replace(START, algorithm="grpo")
    state = state_after([start, make_group(1, wrote("two", 1.5, 1.0, answer=1.0, format=0.5))])
    assert "answer 1.000 format 0.500" in lines_of(state, View(pane="g"))
    state = state_after(
        [start, make_group(1, *(wrote(f"number {n}, " + "word " * 60, n / 64, 1.0) for n in range(64)))]
    )
    seen = set()
    for page in range(64):
        lines = lines_of(state, View(pane="g", sample=page))
        seen |= {n for n in range(64) for line in lines if f" number {n}, word" in line}
    assert seen == set(range(64)) and any("page 2 of" in line for line in lines_of(state, View(pane="g", sample=1)))


def test_keys_open_and_leave_the_group() -> None:
    view = handle_key(View(), "g")
    assert (
        view.pane == "g"
        and not handle_key(view, "g").pane
        and not handle_key(view, "\x1b").pane
        and not handle_key(View(help=True), "\x1b").help
    )
    assert handle_key(View(help=True), "g") == View(pane="g")
    sft, grpo = state_after(RECORDED), state_after(GRPO)
    assert "newest group" in plain_text(render(grpo, View(help=True, owns_run=False), 80, 24))
    assert " g group" in plain_text(render(grpo, View(), 80, 24))
    assert "newest group" not in plain_text(render(sft, View(help=True), 80, 24)) and "group" not in plain_text(
        render(sft, View(), 80, 24)
    )
    assert "no completions yet" in plain_text(render(sft, View(pane="g"), 80, 24))


def test_the_phases_of_a_step_share_its_time() -> None:
    """The event of a group comes within its step: the time before it belongs to the step as well."""
    stats = {"reward": 0.5, "rollout_seconds": 3.0, "reward_seconds": 1.0}
    events = [
        replace(START, algorithm="grpo"),
        make_group(1, wrote("x", 0.0, 0.0), time=4.0),
        LogMessage(message="within", time=5.0),
        StepEnd(step=1, steps=9, stats=stats, seconds=10.0, tokens=5, time=10.0),
    ]
    state = state_after(events)
    assert state.step_phase_shares() == {"rollout": 0.3, "reward": 0.1, "update": 0.6} and state.phase_shares() == {
        "training": 1.0
    }
    assert "step rollout 30% reward 10% update 60%" in " ".join(lines_of(state, View()))
    assert state_after([START, *steps(3)]).step_phase_shares() == {}


def test_heldout_accuracy_during_training_is_a_curve_not_a_stage() -> None:
    def measured(step: int, model: str, exact: float, time: float) -> Evaluated:
        return Evaluated(
            step=step,
            stats={f"heldout/{model}/accuracy": exact, f"heldout/{model}/mean_length": 9.0},
            time=time,
            best=model == "policy",
        )

    events = [
        replace(START, algorithm="grpo"),
        measured(0, "sft", 0.25, 1.0),
        *steps(4, reward=0.5),
        measured(4, "policy", 0.5, 5.0),
        answered(4, "2"),
        measured(8, "policy", 0.75, 11.0),
    ]
    state = state_after(events)
    assert (
        list(state.heldout) == ["sft"]
        and state.series["heldout/accuracy"].points == [(4, 0.5), (8, 0.75)]
        and state.best_step == 8
    )
    shown = plain_text(render(state, View(), 120, 40))
    for words in (
        "held-out exact, pass@1 75.0 %",
        "sft 25.0 %, now 75.0 % (pass@1)",
        "answers of the policy after step",
    ):
        assert words in shown
    state.apply(measured(8, "grpo", 0.625, 12.0))
    assert list(state.heldout) == ["sft", "grpo"] and "now" not in plain_text(render(state, View(), 120, 40))
    # any algorithm may select its best step by answers
    sft = state_after([START, *steps(4), measured(4, "policy", 0.5, 5.0)])
    assert "held-out exact, pass@1 50.0 %" in plain_text(render(sft, View(), 120, 40))


def test_several_rewards_share_a_chart_and_the_whole_has_a_band() -> None:
    stats = {
        "reward": 1.0,
        "reward_std": 0.25,
        "rewards/answer/mean": 0.75,
        "rewards/chosen_words/mean": 0.5,
        "rewards/zeta/mean": 0.125,
    }
    state = state_after([replace(START, algorithm="grpo"), *steps(9, **stats)])
    shown = plain_text(render(state, View(ascii_only=True), 120, 40))
    assert "reward 1.00 +- 0.250" in shown and "rewards answer 0.750 chosen words" not in shown
    assert "rewards answer 0.750 chosen_words 0.500 zeta 0.125" in " ".join(shown.split())
    lines = chart_pane(state, ("reward",), View(ascii_only=True), 60, 12)
    drawn = {
        (sign, style)
        for line in lines[1:]
        for text, style in line
        if style in ("quiet", "first")
        for sign in text
        if sign in ".*"
    }
    assert {("*", "first"), (".", "quiet")} <= drawn
    # the band does not leave the range of the rewards, which is from 0 to 1
    assert plain_text(lines).splitlines()[1].strip().startswith("1.0")


def test_wrapping_and_fitting_by_cells() -> None:
    assert (
        wrap("one two three", 8, 5) == ["one two", "three"]
        and wrap("x" * 9, 4, 2) == ["xxxx", "x..."]
        and wrap("", 9, 2) == []
    )
    assert wrap("\u4e2d" * 5, 6, 3) == ["\u4e2d" * 3, "\u4e2d" * 2]
    assert fit([("\u4e2d\u4e2d", "")], 3) == [("\u4e2d ", "")] and fit([("a", "")], 3) == [("a", ""), ("  ", "")]


def test_the_picture_in_the_readme_is_drawn_from_the_recorded_run() -> None:
    """Made by `python -m lowrank_tune.ui.terminal.screenshot` with `tests/recorded/demo.jsonl` and 120 40 86."""
    svg = screenshot(state_at_step(RECORDED, 86), 120, 40)
    assert svg == (HERE.parent / "docs" / "dashboard.svg").read_text(encoding="utf-8")
    assert "url(http" not in svg and "@font-face" not in svg
    words = "".join(ElementTree.fromstring(svg).itertext()).replace("\xa0", " ")
    for wanted in ("lowrank-tune", "step 86/96", "KL to the reference", "overfitting", "What is 6 * 33?"):
        assert wanted in words
