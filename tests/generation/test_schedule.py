"""The order in which waiting sequences start: longest expected first takes fewer steps, no order changes a completion,
and without expected lengths prompts are read by their own length."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import llama_roles, perturb

from lowrank_tune.generation import Engine
from lowrank_tune.generation.completion_lengths import CompletionLengths
from lowrank_tune.generation.decode_scheduler import DecodeScheduler
from lowrank_tune.generation.outputs import Completion
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.generation.stopping import StoppingCriteria
from lowrank_tune.model.roles import Roles

STOP = 1
LONG = 1000


class Rollout:
    """Runs a scheduler without a model. Sample s of prompt p ends after `lengths[p][s]` tokens."""

    def __init__(
        self,
        lengths: Sequence[Sequence[int]],
        slots: int,
        expected: Sequence[int] | None = None,
        prompt_lengths: Sequence[int] | None = None,
    ) -> None:
        prompts = [[2] * length for length in prompt_lengths or [3] * len(lengths)]
        sampling = SamplingParams(LONG, frozenset({STOP}))
        self.lengths = lengths
        self.scheduler = DecodeScheduler(
            prompts, len(lengths[0]), sampling, StoppingCriteria(sampling, None), range(len(prompts)), expected
        )
        self.prefills = list[list[int]]()
        self.decode_steps = 0
        self.completions = list[Completion]()
        self.run(slots)

    def run(self, slots: int) -> None:
        scheduler = self.scheduler
        scheduler.start(slots)
        while not scheduler.is_done:
            prompts = scheduler.next_prompts()
            if prompts:
                self.prefills.append(prompts)
                for sequence in scheduler.add_prefilled(prompts, None):
                    sequence.append(self.token(sequence.prompt, sequence.sample, 0), 0.0)
            placements = list(scheduler.admit(self.room))
            if placements:
                self.completions += scheduler.retire([slot for placement in placements for slot in placement.slots])
                continue
            scheduler.compact()
            rows = scheduler.decoding()
            drawn = [(self.token(row.prompt, row.sample, len(row.token_ids)), 0.0) for row in rows]
            self.completions += scheduler.retire(scheduler.append_drawn(rows, drawn))
            self.decode_steps += 1

    def room(self, cache: object, cache_row: int) -> int:
        return LONG

    def token(self, prompt: int, sample: int, index: int) -> int:
        return STOP if index + 1 == self.lengths[prompt][sample] else 0


def lognormal_lengths(prompts: int, n: int, seed: int) -> list[list[int]]:
    """Lengths of completions around 200 tokens. The samples of a prompt differ less than the prompts do."""
    stream = random.Random(seed)
    lengths = []
    for _ in range(prompts):
        median = stream.lognormvariate(math.log(200), 0.8)
        lengths.append([min(LONG, max(1, round(median * stream.lognormvariate(0, 0.25)))) for _ in range(n)])
    return lengths


def means(lengths: Sequence[Sequence[int]]) -> list[int]:
    return [round(sum(group) / len(group)) for group in lengths]


@pytest.mark.parametrize("seed", range(4))
def test_the_longest_expected_first_takes_fewer_steps(seed: int) -> None:
    """Expected are the lengths of the epoch before, whose samples are others of the same distribution."""
    lengths = lognormal_lengths(32, 8, seed)
    stream = random.Random(seed)
    before = [[max(1, round(length * stream.lognormvariate(0, 0.2))) for length in group] for group in lengths]
    steps, unordered = (Rollout(lengths, 64, expected).decode_steps for expected in (means(before), None))
    lower_bound = max(max(map(max, lengths)), sum(map(sum, lengths)) / 64) - 1
    assert steps < 0.9 * unordered
    assert steps < 1.12 * lower_bound


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=24), slots=st.integers(1, 8))
def test_known_lengths_take_the_steps_of_lpt_scheduling(lengths: list[int], slots: int) -> None:
    """Each next longest sequence goes to the slot that is free first, which takes at most 4/3 of the fewest steps
    (Graham 1969). The first token of a sequence is drawn in no step of its own."""
    steps = Rollout([[length] for length in lengths], slots, lengths).decode_steps
    work = [length - 1 for length in lengths]
    longest_first = [0] * slots
    for length in sorted(work, reverse=True):
        longest_first[longest_first.index(min(longest_first))] += length
    assert steps == max(longest_first)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=2), min_size=1, max_size=12),
    slots=st.integers(1, 9),
    seed=st.integers(0, 9),
)
def test_every_order_draws_every_sequence_once(lengths: list[list[int]], slots: int, seed: int) -> None:
    stream = random.Random(seed)
    expected = [stream.randrange(3) for _ in lengths]
    found = Rollout(lengths, slots, expected, [stream.randrange(1, 9) for _ in lengths])
    names = {(one.prompt, one.sample): len(one.token_ids) for one in found.completions}
    assert len(names) == len(found.completions) == 2 * len(lengths)
    assert all(names[prompt, sample] == lengths[prompt][sample] for prompt, sample in names)
    assert sorted(sum(found.prefills, [])) == list(range(len(lengths)))


def test_without_expected_lengths_prompts_are_read_by_their_own_length() -> None:
    lengths = [[4, 4]] * 6
    prompt_lengths = [5, 1, 4, 2, 6, 3]
    for expected in (None, [7] * 6):
        read = sum(Rollout(lengths, 4, expected, prompt_lengths).prefills, [])
        assert read == [1, 3, 5, 2, 0, 4]


def test_prompts_that_start_at_once_are_read_by_their_own_length() -> None:
    """Four of six fit: the four longest expected. The two others follow, the longer expected one first."""
    scheduler = Rollout([[4, 4]] * 6, 8, [5, 9, 7, 6, 1, 8], [5, 1, 4, 2, 6, 3]).scheduler
    scheduler.unfinished = [[0, 1] for _ in range(6)]
    scheduler.start(8)
    assert [*scheduler.waiting] == [1, 3, 5, 2, 0, 4]
    scheduler.set_slots(4, 4)
    assert [*scheduler.waiting] == [1, 5, 2, 3, 0, 4]
    scheduler.set_slots(12, 12)
    assert [*scheduler.waiting] == [1, 3, 5, 2, 0, 4]


@pytest.fixture(scope="module")
def roles() -> Roles:
    made = llama_roles(4, lower=["sft"])
    perturb(made, "policy", "sft")
    return made


@pytest.mark.parametrize("slots", [1, 3, 5])
def test_completions_are_the_same_in_any_order(roles: Roles, slots: int) -> None:
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17], [40, 41], [5, 6, 7, 8]]
    sampling = SamplingParams(12, frozenset(range(2, 8)), 1.0)
    orders = [None, [1, 2, 3, 4, 5], [5, 4, 3, 2, 1], [0, 9, 0, 9, 4]]
    found = []
    for expected in orders:
        completions = Engine(roles, "policy", slots).generate(prompts, 2, sampling, expected_lengths=expected)
        found.append({(one.prompt, one.sample): one for one in completions})
    assert len({tuple(one) for one in found}) > 1, "the orders must differ, or this test is blind"
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, one in found[0].items():
            assert other[name].token_ids == one.token_ids and other[name].finish_reason == one.finish_reason
            assert other[name].logps == pytest.approx(one.logps, abs=1e-5)


# --- lengths that were seen -------------------------------------------------------------------------------------------


def completion(prompt: int, length: int) -> Completion:
    return Completion(prompt, 0, [0] * length, "stop", None)


def test_expected_lengths_are_those_of_the_last_completions_of_a_prompt() -> None:
    lengths = CompletionLengths()
    assert lengths.expected([[5], [6, 7]]) == [0, 0]
    lengths.record([[5], [6, 7]], [completion(0, 10), completion(0, 21), completion(1, 2)])
    assert lengths.expected([[6, 7], [5], [6], [7, 6]]) == [2, 16, 11, 11]
    lengths.record([[6], [5]], [completion(1, 3), completion(0, 100)])
    assert lengths.expected([[6, 7], [5], [6], [8]]) == [2, 3, 100, round(136 / 5)]


def test_lengths_of_an_older_checkpoint_are_none() -> None:
    lengths = CompletionLengths()
    lengths.record([[5]], [completion(0, 10)])
    lengths.restore({})
    assert lengths.state() == CompletionLengths().state()
