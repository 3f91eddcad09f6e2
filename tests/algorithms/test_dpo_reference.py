"""DPO: the check of the reference before the first step, and the cache of its log-probs.

The log-probs of the reference are computed once for a dataset. The oracle of the cache is a new computation, and the
model of transformers on each row alone.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from algorithm_helpers import LONG_PROMPTS, dpo_over, own_reference_sums, pair_batch, pair_rows, small_dpo
from models import CPU, changed_tensors, llama_roles, perturb, roles_over, same_bytes
from safetensors.torch import save
from torch import Tensor

from lowrank_tune import Recipe
from lowrank_tune.algorithms import reference_logps as reference_module
from lowrank_tune.algorithms.dpo import DPO
from lowrank_tune.algorithms.reference_logps import reference_logps
from lowrank_tune.assembly import build
from lowrank_tune.batch import Batch
from lowrank_tune.data import TokenizedDataset, collate_units
from lowrank_tune.data.array_files import checksum
from lowrank_tune.errors import TrainingError
from lowrank_tune.model.roles import Roles

Fault = Callable[[Roles, Batch], None]

# --- the check before the first step ----------------------------------------------------------------------------------


def started(bits: int = 16, share: bool = True, fresh: bool = True, **more: Any) -> tuple[Roles, DPO, Batch]:
    """Returns a fresh policy over a frozen SFT adapter, DPO, and pairs with the log-probs of the reference."""
    roles = llama_roles(bits, lower=["sft"], **more)
    perturb(roles, "sft", size=0.05)
    rows, masks = pair_rows(LONG_PROMPTS)
    batch = pair_batch(rows, masks, share=share)
    batch.reference_sequence_logps = own_reference_sums(roles, pair_batch(rows, masks))
    return roles, dpo_over(roles, reference_description="the base with the frozen adapter sft", fresh=fresh), batch


def _sft_exchanged(roles: Roles, batch: Batch) -> None:
    perturb(roles, "sft", size=0.05, seed=9)


def _sft_nudged(roles: Roles, batch: Batch) -> None:
    for name, parameter in roles.base.model.named_parameters():
        if ".lt_sft." in name:
            parameter.data.mul_(1.001)


def _policy_not_zero(roles: Roles, batch: Batch) -> None:
    perturb(roles, "policy", size=0.01)


def _policy_not_zero_in_one_element(roles: Roles, batch: Batch) -> None:
    """One element of one B in the last layer."""
    for name, parameter in roles.base.model.named_parameters():
        if ".lt_policy." in name and "lora_B" in name and "down_proj" in name:
            last = parameter
    last.data[3, 1] = 1e-2


def _dropout_below(roles: Roles, batch: Batch) -> None:
    for module in roles.base.model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["lt_sft"] = torch.nn.Dropout(0.3)


def _reference_is_the_base(roles: Roles, batch: Batch) -> None:
    roles.stacks["reference"] = []


def _reference_is_the_policy(roles: Roles, batch: Batch) -> None:
    perturb(roles, "policy", size=0.05)
    roles.stacks["reference"] = roles.stacks["policy"]


def _cache_off(roles: Roles, batch: Batch) -> None:
    batch.reference_sequence_logps[3] += 1e-3


def _cache_swapped(roles: Roles, batch: Batch) -> None:
    batch.reference_sequence_logps = batch.reference_sequence_logps.flip(0)


def _cache_not_a_number(roles: Roles, batch: Batch) -> None:
    batch.reference_sequence_logps[0] = math.nan


CACHE_FAULTS = [_sft_exchanged, _sft_nudged, _reference_is_the_policy, _cache_off, _cache_swapped, _cache_not_a_number]
EQUALITY_FAULTS = [_policy_not_zero, _policy_not_zero_in_one_element, _dropout_below, _reference_is_the_base]


@pytest.mark.parametrize(
    "how", [{}, {"bits": 4}, {"checkpointing": True}, {"share": False}, {"dropout": 0.2}, {"fresh": False}], ids=str
)
def test_right_reference_passes_check(how: dict[str, Any]) -> None:
    """The check passes, and changes neither the train mode, nor the gradients, nor the random state."""
    roles, algorithm, batch = started(**how)
    before = torch.random.get_rng_state()
    algorithm.check(batch, 0)
    assert roles.base.model.training
    assert not any(p.grad is not None for p in roles.parameters("policy"))
    assert how.get("dropout") or same_bytes(before, torch.random.get_rng_state())


@pytest.mark.parametrize("fault", CACHE_FAULTS + EQUALITY_FAULTS)
def test_wrong_reference_stops_run(fault: Fault) -> None:
    """A change of reference, cache or fresh policy raises TrainingError with a description of the reference."""
    roles, algorithm, batch = started()
    fault(roles, batch)
    with pytest.raises(TrainingError, match="reference") as caught:
        algorithm.check(batch, 0)
    assert "the base with the frozen adapter sft" in str(caught.value)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("fault", CACHE_FAULTS)
@pytest.mark.parametrize(("fresh", "step"), [(False, 0), (True, 7)])
def test_trained_policy_passes_check_and_wrong_cache_does_not(fault: Fault, fresh: bool, step: int) -> None:
    """A continued policy, or one after step 0, need not equal its reference; the cache must still equal it."""
    roles, algorithm, batch = started(fresh=fresh)
    perturb(roles, "policy", size=0.05)
    algorithm.check(batch, step)
    fault(roles, batch)
    with pytest.raises(TrainingError, match="cached log-probs of the reference"):
        algorithm.check(batch, step)


@pytest.mark.parametrize(
    ("nats_per_token", "expectation"),
    [
        (5e-6, nullcontext()),
        (-5e-6, nullcontext()),
        (1.6e-5, pytest.raises(TrainingError)),
        (-1.6e-5, pytest.raises(TrainingError)),
    ],
)
def test_cache_check_tolerates_rounding_only(nats_per_token: float, expectation: Any) -> None:
    """Cached log-probs may be off by 5e-6 nats per token, not by 1.6e-5."""
    _, algorithm, batch = started()
    batch.reference_sequence_logps += nats_per_token * batch.loss_mask.sum(dim=1)
    with expectation:
        algorithm.check(batch, 0)


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built_dpo() -> Iterator[Any]:
    """A small DPO run that is built, without its adapters: data and fp32 base."""
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patched:
        patched.setenv("LOWRANK_TUNE_CACHE", scratch)
        few = {**small_dpo()["data"], "train": [{"dataset": "builtin:arithmetic-preferences", "max_samples": 12}]}
        built = build(Recipe.from_dict(small_dpo(data=few)), lambda event: None, CPU)
        built.roles.unload_adapters()
        yield built


@contextmanager
def reference_over_sft(built: Any, **lora: Any) -> Iterator[Roles]:
    """Roles with a frozen SFT adapter below the policy."""
    roles = roles_over(built.base, lower=["sft"], **lora)
    perturb(roles, "sft", size=0.02)
    try:
        yield roles
    finally:
        roles.unload_adapters()


@pytest.fixture
def roles(built_dpo: Any) -> Iterator[Roles]:
    with reference_over_sft(built_dpo) as roles:
        yield roles


@contextmanager
def count_reference_batches() -> Iterator[list[int]]:
    """Counts the batches whose log-probs the reference computes."""
    count, logps = [0], Roles.logps

    def counted_logps(self: Roles, role: str, batch: Batch, *rest: Any) -> Any:
        count[0] += role == "reference"
        return logps(self, role, batch, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Roles, "logps", counted_logps)
        yield count


def sums_and_batches(
    built: Any,
    roles: Roles,
    cache: Path,
    micro_tokens: int = 600,
    base_hash: str = "b",
    store: TokenizedDataset | None = None,
) -> tuple[Tensor, int]:
    """Returns the log-probs of the reference, and how many batches were computed for them; 0 if they were cached."""
    store = built.data.train if store is None else store
    with count_reference_batches() as count:
        sums = reference_logps(
            roles,
            store,
            lambda units: collate_units(store, units, 0),
            micro_tokens,
            base_hash,
            cache,
            lambda event: None,
        )
    return sums, count[0]


def plain_sum(roles: Roles, row: Any) -> Tensor:
    """Returns log ref(y | x) of one row, by the logits of transformers in fp32 and a float64 softmax."""
    ids, mask = torch.tensor([list(map(int, row.input_ids))]), torch.tensor(list(map(bool, row.completion_mask)))
    with roles.inference_mode(), roles.activate("reference"):
        logp = torch.log_softmax(roles.base.model(input_ids=ids).logits[0].double(), dim=1)
    return logp[:-1].gather(1, ids[0, 1:, None])[:, 0][mask[1:]].sum()


def error_per_token(built: Any, sums: Tensor, expected: Tensor) -> float:
    """Returns the largest distance in nats per token of the answer."""
    num_tokens = torch.tensor([sum(built.data.train[i].completion_mask) for i in range(len(sums))])
    return float(((sums - expected).abs() / num_tokens).max())


def test_second_call_reads_cache(built_dpo: Any, roles: Roles, cache: Path) -> None:
    """The second call computes no batch and returns the same bits."""
    first, num_computed = sums_and_batches(built_dpo, roles, cache)
    again, num_computed_again = sums_and_batches(built_dpo, roles, cache)
    assert num_computed > 1
    assert num_computed_again == 0
    assert same_bytes(first, again)


def test_cached_sums_equal_new_computation(built_dpo: Any, roles: Roles, cache: Path) -> None:
    """The cached sums are bit for bit those of another, empty cache folder."""
    sums_and_batches(built_dpo, roles, cache)
    cached, num_computed = sums_and_batches(built_dpo, roles, cache)
    computed, _ = sums_and_batches(built_dpo, roles, cache / "elsewhere")
    assert num_computed == 0 and same_bytes(cached, computed)


def test_cached_sums_equal_plain_model(built_dpo: Any, roles: Roles, cache: Path) -> None:
    """The sums are those of the logits of transformers, one row at a time."""
    sums, _ = sums_and_batches(built_dpo, roles, cache)
    alone = torch.stack([plain_sum(roles, built_dpo.data.train[i]) for i in range(len(sums))])
    assert error_per_token(built_dpo, sums, alone) < 1e-5


def test_sums_do_not_depend_on_batch_size(built_dpo: Any, roles: Roles, cache: Path) -> None:
    """Batches of another size give the same sums."""
    sums, _ = sums_and_batches(built_dpo, roles, cache)
    smaller, _ = sums_and_batches(built_dpo, roles, cache / "other", micro_tokens=200)
    assert error_per_token(built_dpo, sums, smaller) < 1e-5


def with_flipped_bit(store: TokenizedDataset, name: str, folder: Path) -> TokenizedDataset:
    """Returns a copy of the store in which one id (as by another template) or one entry of the mask differs."""
    shutil.copytree(store.folder, folder)
    file = folder / f"{name}.npy"
    values = np.load(file)
    values[np.load(folder / "starts.npy")[store.indices[0] + 1] - 2] ^= 1
    np.save(file, values)
    state = json.loads((folder / "store.json").read_text(encoding="utf-8"))
    state["sums"][file.name] = checksum(file)
    (folder / "store.json").write_text(json.dumps(state), encoding="utf-8")
    copy = TokenizedDataset.open(folder)
    assert copy is not None
    return copy.select_rows(store.indices)


def changes_that_hit_the_cache(built: Any, cache: Path) -> set[str]:
    """Returns the changes after which the cache of before is read. Empty is right."""
    hits, train = set(), built.data.train

    def look_up(name: str, roles: Roles, **options: Any) -> None:
        if sums_and_batches(built, roles, cache, **options)[1] == 0:
            hits.add(name)

    with reference_over_sft(built) as roles:
        sums_and_batches(built, roles, cache)
        look_up("base", roles, base_hash="c")
        look_up("rows", roles, store=train.select_units(np.arange(train.units - 1)))
        look_up("order of rows", roles, store=train.select_units(np.arange(train.units)[::-1].copy()))
        for name in ("input_ids", "completion_mask"):
            with tempfile.TemporaryDirectory() as scratch:
                look_up(name, roles, store=with_flipped_bit(train, name, Path(scratch) / "store"))
        roles.stacks["reference"] = []
        look_up("stack", roles)
        roles.stacks["reference"] = ["lt_sft"]
        roles.base = replace(roles.base, bits=4)
        look_up("bits", roles)
        roles.base = replace(roles.base, bits=16)
        assert sums_and_batches(built, roles, cache)[1] == 0, "everything is as before, but the cache is not read"
        next(p for name, p in roles.base.model.named_parameters() if ".lt_sft." in name).data[0, 0] += 1e-6
        look_up("an element of the adapter", roles)
    for name, lora in (("alpha", {"lora_alpha": 8.0}), ("rslora", {"use_rslora": True})):
        with reference_over_sft(built, **lora) as roles:
            look_up(name, roles)
    return hits


def test_cache_misses_after_any_change_of_inputs(built_dpo: Any, cache: Path) -> None:
    """A change of base, rows, order, ids, masks, adapters, weights, scales or bits is computed anew."""
    assert changes_that_hit_the_cache(built_dpo, cache) == set()


def test_key_without_an_input_is_found(built_dpo: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`changes_that_hit_the_cache` finds keys without the weights of adapters, without the rows, and a constant key."""
    with monkeypatch.context() as patch:
        patch.setattr(Roles, "adapter_tensors", lambda self, name: {})
        assert changes_that_hit_the_cache(built_dpo, cache / "1") == {"an element of the adapter"}
    with monkeypatch.context() as patch:
        patch.setattr(TokenizedDataset, "content_hash", lambda self: str(len(self)))
        assert changes_that_hit_the_cache(built_dpo, cache / "2") == {"order of rows", "input_ids", "completion_mask"}
    with monkeypatch.context() as patch:
        # Private: no public function replaces the whole key.
        patch.setattr(reference_module, "_cache_key", lambda *_: "same")
        # All but a store of another length.
        assert len(changes_that_hit_the_cache(built_dpo, cache / "3")) >= 8


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "another count", "without checksum"])
def test_damaged_cache_file_is_replaced(built_dpo: Any, roles: Roles, cache: Path, damage: str) -> None:
    """A damaged file counts as absent: all batches are computed, and the file is written again."""
    sums, num_batches = sums_and_batches(built_dpo, roles, cache)
    (file,) = (cache / "reference").glob("*.safetensors")
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[content.index(sums.numpy().tobytes()[:8]) + 2] ^= 1
    damaged = {
        "truncated": content[:-7],
        "flipped": bytes(flipped),
        "empty": b"",
        "another count": save({"sums": sums[:-2]}),
        "without checksum": save({"sums": sums}),
    }
    file.write_bytes(damaged[damage])
    again, num_computed = sums_and_batches(built_dpo, roles, cache)
    assert num_computed == num_batches
    assert same_bytes(again, sums)
    assert file.read_bytes() == content


def test_flipped_bit_of_cache_file_changes_no_sum(
    built_dpo: Any, roles: Roles, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flipped bit in the numbers, the checksum or the header is found, or changes nothing that is read."""
    train = built_dpo.data.train
    drawn = torch.randn(int(train.indices.max()) + 1, 1)
    expected = drawn[train.indices, 0]

    def drawn_logps(self: Roles, role: str, batch: Batch) -> Any:
        return SimpleNamespace(logps=drawn[batch.row_indices])

    monkeypatch.setattr(Roles, "logps", drawn_logps)
    roles.stacks["reference"] = []

    def read() -> Tensor:
        return sums_and_batches(built_dpo, roles, cache, micro_tokens=10**9)[0]

    assert same_bytes(read(), expected)
    (file,) = (cache / "reference").glob("*.safetensors")
    content = file.read_bytes()
    for bit in range(0, 8 * len(content), 3):
        broken = bytearray(content)
        broken[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bytes(broken))
        assert same_bytes(read(), expected), f"bit {bit}"


# --- the cache of a whole recipe --------------------------------------------------------------------------------------


def built_with_notes(**changes: Any) -> tuple[Any, list[str], int]:
    """Builds a small recipe. Returns it with its messages and the number of batches that the reference computed."""
    notes: list[str] = []
    recipe = Recipe.from_dict(small_dpo(**changes))
    with count_reference_batches() as count:
        built = build(recipe, lambda event: notes.append(getattr(event, "message", "")), CPU)
    return built, notes, count[0]


def test_second_build_reads_cache(cache: Path) -> None:
    """The second build computes nothing, prints two notes (training and validation rows), and has the same sums."""
    first, _, num_first = built_with_notes()
    second, notes, num_second = built_with_notes()
    assert num_first > 1
    assert num_second == 0
    assert sum("computed before" in note for note in notes) == 2
    a, b = (built.algorithm.collect(0).batch.reference_sequence_logps for built in (first, second))
    assert same_bytes(a, b)


@pytest.mark.parametrize(
    "change",
    [
        {"base": {"model": "tiny-tutor", "bits": 4}},
        {"data": {**small_dpo()["data"], "system_prompt": "Be brief."}},
    ],
    ids=["bits", "system prompt"],
)
def test_build_of_changed_recipe_computes_anew(cache: Path, change: dict[str, Any]) -> None:
    """Another base or another system prompt is not read from the cache of the first recipe."""
    _, _, num_first = built_with_notes()
    _, _, num_changed = built_with_notes(**change)
    assert num_first > 0
    assert num_changed > 0
    assert "base" not in change or num_changed == num_first


def test_two_builds_with_one_seed_are_equal(cache: Path) -> None:
    """One seed gives the same adapters and batches, another seed gives others."""
    one, two, other = (build(Recipe.from_dict(small_dpo(seed=seed)), lambda event: None, CPU) for seed in (5, 5, 6))
    assert changed_tensors(one.roles.adapter_tensors("policy"), two.roles.adapter_tensors("policy")) == set()
    assert changed_tensors(one.roles.adapter_tensors("policy"), other.roles.adapter_tensors("policy")) != set()
    for step in range(3):
        a, b = (built.algorithm.collect(step).batch.tensors() for built in (one, two))
        assert changed_tensors(a, b) == set()
    assert not same_bytes(one.algorithm.collect(0).batch.row_indices, other.algorithm.collect(0).batch.row_indices)


def test_training_rows_have_their_own_reference_sums(cache: Path) -> None:
    """Each row of a training batch of a built recipe has the log-prob of that row, in spite of shuffling and
    collating."""
    built = build(Recipe.from_dict(small_dpo()), lambda event: None, CPU)
    for step in (0, 1):
        batch = built.algorithm.collect(step).batch
        with built.roles.inference_mode():
            fresh = built.roles.logps("reference", batch).logps.sum(dim=1)
        assert float((fresh - batch.reference_sequence_logps).abs().max()) < 1e-3
        assert float((fresh.flip(0) - batch.reference_sequence_logps).abs().max()) > 1e-1
        assert len(batch) == 16
        assert same_bytes(batch.margin, torch.zeros(16))
