"""Steps over buffers draw what plain steps draw: padded rows and columns, tokens that are read later, other roles and
training in between, and steps that are captured as graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import perturb, ragged_batch, roles_over, unquantized_base
from rollout_helpers import Completions, assert_equal_completions, by_sample, ragged_prompts, stacked_llama_roles

from lowrank_tune.errors import TrainingError
from lowrank_tune.events import Event, is_warning
from lowrank_tune.generation import Engine, cuda_graphs, decode_steps
from lowrank_tune.generation.cuda_graphs import CudaCapture, StepGraphs
from lowrank_tune.generation.decode_steps import BufferedSteps, column_bucket, row_bucket
from lowrank_tune.generation.outputs import Completion, Token
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.model.decoding_options import DecodingOptions
from lowrank_tune.model.oom import MemoryLimits
from lowrank_tune.model.roles import Roles

PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17], [40, 41], [5, 6, 7, 8]]


@pytest.fixture(scope="module")
def roles() -> Iterator[Roles]:
    yield from stacked_llama_roles()


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_steps, "COLUMNS_PER_BUCKET", 8)


def make_engine(roles: Roles, sync_every: int | None, role: str = "policy", **more: Any) -> Engine:
    """An engine with buffers as on a GPU, and with plain steps if `sync_every` is None."""
    engine = Engine(roles, role, **more)
    engine.buffered = sync_every is not None
    roles.decoding = DecodingOptions(sync_every or 1)
    return engine


def completions(roles: Roles, sync_every: int | None, sampling: SamplingParams, **more: Any) -> Completions:
    prompts, n = more.pop("prompts", PROMPTS), more.pop("n", 2)
    found = make_engine(roles, sync_every, **more).generate(prompts, n, sampling)
    return by_sample(found)


@settings(max_examples=12, deadline=None)
@given(
    sync_every=st.integers(1, 9),
    slots=st.integers(1, 11),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    max_new_tokens=st.integers(1, 20),
    temperature=st.sampled_from([0.0, 1.0]),
    num_stops=st.sampled_from([0, 12]),
)
def test_blocks_draw_what_single_steps_draw(
    roles: Roles,
    sync_every: int,
    slots: int,
    lengths: list[int],
    max_new_tokens: int,
    temperature: float,
    num_stops: int,
) -> None:
    """Sequences of other lengths, in more and in fewer slots than there are, which end at their stop ids or at the
    limit, so that others take their slots."""
    prompts = ragged_prompts(lengths)
    sampling = SamplingParams(max_new_tokens, frozenset(range(num_stops)), temperature)
    expected = completions(roles, None, sampling, prompts=prompts, slots=slots)
    assert_equal_completions(completions(roles, sync_every, sampling, prompts=prompts, slots=slots), expected)


@pytest.mark.parametrize(("sync_every", "slots"), [(1, 10), (4, 10), (7, 3)])
def test_dropped_tokens_are_counted(roles: Roles, sync_every: int, slots: int) -> None:
    """All other drawn tokens are in the completions, whose first tokens are drawn when the prompts are read."""
    engine = make_engine(roles, sync_every, slots=slots)
    found = list(engine.generate(PROMPTS, 2, SamplingParams(20, frozenset(range(9)), 1.0)))
    wasted = engine.wasted_ratio()
    assert wasted is not None and wasted.count - wasted.total == sum(len(one.token_ids) - 1 for one in found)
    assert (wasted.total > 0) == (sync_every > 1)
    assert make_engine(roles, None).wasted_ratio() is None


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gemma2", "mistral"])
def test_blocks_of_other_families(kind: str) -> None:
    """With sliding windows, soft caps, biases and norms of queries; rows grow beyond the window."""
    roles = roles_over(unquantized_base(kind))
    perturb(roles, "policy")
    sampling = SamplingParams(24, frozenset(range(3)), 1.0)
    assert_equal_completions(completions(roles, 5, sampling, slots=4), completions(roles, None, sampling, slots=4))


def test_stop_strings_end_a_completion_within_a_block(roles: Roles) -> None:
    sampling = SamplingParams(20, frozenset(), 1.0, stop_strings=("e", "xy"))

    def decode(ids: Any) -> str:
        return "".join(chr(97 + token % 26) for token in ids)

    expected = completions(roles, None, sampling, decode=decode)
    assert any(one.finish_reason == "stop" and len(one.token_ids) < 18 for one in expected.values())
    assert_equal_completions(completions(roles, 7, sampling, decode=decode), expected)


def test_roles_that_alternate_and_training_between_completions(roles: Roles) -> None:
    """Between two completions another role decodes, and the policy computes gradients."""
    sampling = SamplingParams(16, frozenset(range(6)), 1.0)
    expected = {role: completions(roles, None, sampling, role=role, slots=3) for role in ("policy", "reference")}
    streams = {
        role: make_engine(roles, 4, role, slots=3).generate(PROMPTS, 2, sampling) for role in ("policy", "reference")
    }
    found: dict[str, Completions] = {"policy": {}, "reference": {}}
    while streams:
        for role, stream in list(streams.items()):
            one = next(stream, None)
            if one is None:
                del streams[role]
                continue
            found[role][one.prompt, one.sample] = one
            roles.hidden("policy", ragged_batch()).sum().backward()
    for role, completed in expected.items():
        assert_equal_completions(found[role], completed)


def test_a_chat_and_a_rollout_that_alternate_with_training(roles: Roles) -> None:
    """Each token of the chat, and each completion of the rollout, is followed by a gradient of the policy."""
    sampling = SamplingParams(14, frozenset(range(6)), 1.0)
    expected = completions(roles, None, sampling, slots=3)
    answer = list(make_engine(roles, None).stream([[3, 8, 9]], 1, sampling))
    rollout = make_engine(roles, 4, slots=3).generate(PROMPTS, 2, sampling)
    chat = make_engine(roles, 4).stream([[3, 8, 9]], 1, sampling)
    found: Completions = {}
    outputs: list[Token | Completion] = []
    while len(found) < len(expected) or len(outputs) < len(answer):
        one = next(rollout, None)
        if one is not None:
            found[one.prompt, one.sample] = one
        output = next(chat, None)
        if output is not None:
            outputs.append(output)
        roles.hidden("policy", ragged_batch()).sum().backward()
    assert_equal_completions(found, expected)
    assert outputs[:-1] == answer[:-1]
    first, last = outputs[-1], answer[-1]
    assert isinstance(first, Completion) and isinstance(last, Completion)
    assert_equal_completions({(0, 0): first}, {(0, 0): last})


def test_a_stream_has_each_token_at_once(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    """After one step for each: the first token of a sequence is drawn when its prompt is read."""
    sampling = SamplingParams(10, frozenset(), 1.0)
    plain = [one for one in make_engine(roles, None).stream(PROMPTS[:1], 1, sampling) if isinstance(one, Token)]
    step, calls = BufferedSteps.step, 0

    def counted(self: BufferedSteps, rows: int, width: int) -> None:
        nonlocal calls
        calls += 1
        step(self, rows, width)

    monkeypatch.setattr(BufferedSteps, "step", counted)
    found: list[Token] = []
    for one in make_engine(roles, 8).stream(PROMPTS[:1], 1, sampling):
        if isinstance(one, Token):
            assert calls == len(found)
            found.append(one)
    assert found == plain


def test_memory_that_runs_out_in_a_block(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = SamplingParams(12, frozenset(range(4)), 1.0)
    expected = completions(roles, None, sampling)
    step, calls = BufferedSteps.step, 0

    def run_short(self: BufferedSteps, rows: int, width: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(self, rows, width)

    monkeypatch.setattr(BufferedSteps, "step", run_short)
    assert_equal_completions(completions(roles, 4, sampling), expected)
    roles.limits = MemoryLimits()


def test_buckets() -> None:
    assert [row_bucket(rows, 48) for rows in (1, 2, 3, 9, 32, 33, 48)] == [1, 2, 4, 16, 32, 48, 48]
    assert [column_bucket(columns, 30) for columns in (1, 8, 9, 24, 25, 30)] == [8, 8, 16, 24, 30, 30]


class FakeGraph:
    """Runs the captured function again."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.run = run
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.run()


class Graphs:
    """Graphs on the CPU. `fault` is raised by a capture, `sync` by the check before, and with `is_wrong` graphs draw
    other tokens."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        fault: Exception | None = None,
        is_wrong: bool = False,
        sync: Exception | None = None,
    ) -> None:
        self.made: list[FakeGraph] = []
        self.checked = 0
        self.events: list[Event] = []
        self.fault, self.is_wrong, self.sync = fault, is_wrong, sync
        self.most_alive = 0
        graphs = self

        class RecordingGraphs(StepGraphs):
            def step(self, steps: BufferedSteps, rows: int, width: int) -> None:
                graphs.steps = steps
                super().step(steps, rows, width)
                graphs.most_alive = max(graphs.most_alive, len(self._graphs))

        def make_graphs(engine: Engine) -> StepGraphs | None:
            return RecordingGraphs(self, engine.roles.decoding, self.events.append)

        monkeypatch.setattr(Engine, "_make_graphs", make_graphs)

    def check(self, run: Callable[[], None]) -> None:
        self.checked += 1
        if self.sync is not None:
            raise self.sync
        run()

    def __call__(self, run: Callable[[], None]) -> FakeGraph:
        if self.fault is not None:
            raise self.fault

        def other() -> None:
            run()
            self.steps.drawn[..., 0] += 1

        self.made.append(FakeGraph(other if self.is_wrong else run))
        return self.made[-1]


def test_steps_that_are_needed_again_are_replayed(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = SamplingParams(30, frozenset(range(4)), 1.0)
    expected = completions(roles, None, sampling)
    graphs = Graphs(monkeypatch)
    assert_equal_completions(completions(roles, 4, sampling), expected)
    assert len(graphs.made) > 3 and sum(graph.replays for graph in graphs.made) > 20 and not graphs.events
    # The first graph is replayed once more, to be compared.
    assert roles.decoding.num_replays == sum(graph.replays for graph in graphs.made) - 1
    assert graphs.checked == 1


def test_few_graphs_exist_at_once(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    sampling = SamplingParams(40, frozenset(range(4)), 1.0)
    expected = completions(roles, None, sampling)
    graphs = Graphs(monkeypatch)
    assert_equal_completions(completions(roles, 4, sampling), expected)
    assert len(graphs.made) > 4 and graphs.most_alive == 2


def ended_capture() -> Exception:
    """The error of a capture that was invalidated, and in its context the one that did so."""
    error = RuntimeError("operation failed due to a previous error during capture")
    error.__context__ = RuntimeError("operation not permitted when stream is capturing")
    return error


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"fault": ended_capture()}, "an error (operation not permitted"),
        ({"sync": RuntimeError("called a synchronizing CUDA operation")}, "an error (called a synchronizing"),
        ({"is_wrong": True}, "other tokens"),
    ],
)
def test_graphs_that_fail_leave_the_plain_step(
    roles: Roles, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any], words: str
) -> None:
    sampling = SamplingParams(30, frozenset(range(4)), 1.0)
    expected = completions(roles, None, sampling)
    graphs = Graphs(monkeypatch, **how)
    assert_equal_completions(completions(roles, 4, sampling), expected)
    # A later rollout of the run does not try again.
    assert not roles.decoding.cuda_graphs
    engine = Engine(roles, "policy")
    engine.buffered = True
    assert_equal_completions(by_sample(engine.generate(PROMPTS, 2, sampling)), expected)
    assert graphs.checked == 1 and roles.decoding.num_replays == 0
    (event,) = graphs.events
    assert is_warning(event) and event.message.startswith(f"{cuda_graphs.NAME}: {words}")  # type: ignore[attr-defined]


def test_a_rollout_without_memory_for_graphs_has_plain_steps(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many slots as before, and the next rollout tries again."""
    sampling = SamplingParams(30, frozenset(range(4)), 1.0)
    expected = completions(roles, None, sampling)
    graphs = Graphs(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    assert_equal_completions(completions(roles, 4, sampling), expected)
    assert roles.decoding.cuda_graphs and roles.limits.cache_tokens == 0
    assert graphs.checked == 1 and not graphs.events


class FailingCapture:
    """torch's context of a capture, whose end raises as that of an invalidated capture does."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None:
        raise RuntimeError("operation failed due to a previous error during capture")


def test_a_capture_that_fails_leaves_stream_and_autocast_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[str] = []

    class Stream(FailingCapture):
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            entered.append(self.name)

        def __exit__(self, *_: object) -> None:
            entered.append("left")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", FailingCapture)
    monkeypatch.setattr(torch.cuda, "stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "current")
    before = torch.is_autocast_cache_enabled()
    states: list[bool] = []
    with pytest.raises(RuntimeError, match="during capture"):
        CudaCapture()(lambda: states.append(torch.is_autocast_cache_enabled()))
    assert states == [False] and torch.is_autocast_cache_enabled() == before and entered == ["current", "left"]


def test_logits_that_are_not_finite_end_a_rollout_within_a_block(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the error of a plain step, not with an id beyond the vocabulary, which on a GPU would end CUDA."""
    step, calls = BufferedSteps.step, 0

    def poisoned(self: BufferedSteps, rows: int, width: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            for layer in self.store.cache.layers:
                layer.values.fill_(torch.nan)
        step(self, rows, width)

    monkeypatch.setattr(BufferedSteps, "step", poisoned)
    with pytest.raises(TrainingError, match="not finite"):
        completions(roles, 8, SamplingParams(20, frozenset(), 1.0))
    assert calls == 8
