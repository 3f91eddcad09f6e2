"""A training step and a decoding step on a CUDA device that is not there: no operation mixes devices or dtypes, and the
host waits for the GPU no more often than the table below.

The counts are those of true shapes (llama-3.1-8b and others) with few layers. `docs/testing.md` describes the device.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from fake_guard import run_on_fake_gpu
from require_fake_gpu import require_fake_gpu

from lowrank_tune.memory_planner.gpu_specs import LAUNCH_SECONDS

WORKER = Path(__file__).with_name("fake_worker.py")

# How often the host waits for the GPU. A wait leaves the GPU idle until the host has launched more work, so raising a
# number needs a reason in the commit; a change that lowers one lowers it here.
WAITS_PER_TRAINING_STEP = {
    # algorithm: collecting the rows, each micro-batch, the rest of the step
    "sft": (0, 0, 2),
    "reward": (0, 0, 2),
    "dpo": (0, 0, 2),
    "grpo": (3, 0, 2),
    "ppo": (5, 0, 2),
}
WAITS_PER_STEP = {"1 row": 0, "16 rows": 0, "stack": 0, "chat": 1}
COPIES_PER_STEP = {"1 row": 0, "16 rows": 0, "stack": 0, "chat": 1}
# By the planner's constants for an RTX 4090, counted and not measured.
MIN_TOKENS_PER_SECOND = {1: 98, 16: 1300, 64: 2800}
MAX_LAUNCHES_PER_LAYER = {1: 32, 16: 30, 64: 30}
NUM_LAYERS = 32

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _fake_gpu_required() -> None:
    require_fake_gpu()


@pytest.fixture(scope="session")
def library_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the compiled library is kept: between runs, if pytest has a cache."""
    store = getattr(request.config, "cache", None)
    if store is None:
        return tmp_path_factory.mktemp("fake_cuda")
    return Path(store.mkdir("fake_cuda"))


@cache
def run_worker(group: str, folder: Path) -> Any:
    """The counts of a group of `fake_worker.py`, or the error with which it failed; it runs once."""
    try:
        return run_on_fake_gpu(folder, WORKER, group)
    except AssertionError as error:
        return error


def counts_of(group: str, folder: Path) -> Any:
    counts = run_worker(group, folder)
    if isinstance(counts, AssertionError):
        raise counts
    return counts


def num_waits(totals: dict[str, Any]) -> int:
    return sum(totals["host_syncs"].values())


@pytest.mark.parametrize("checkpointing", ["all", "none"])
@pytest.mark.parametrize("algorithm", list(WAITS_PER_TRAINING_STEP))
def test_host_waits_of_a_training_step(algorithm: str, checkpointing: str, library_folder: Path) -> None:
    step = counts_of("training", library_folder)[algorithm][checkpointing]
    assert step["num_micro_batches"] == 2
    waits = {phase: step[phase]["host_syncs"] for phase in ("collect", "micro", "rest")}
    collect, micro, rest = WAITS_PER_TRAINING_STEP[algorithm]
    assert [num_waits(step[phase]) for phase in waits] == [collect, 2 * micro, rest], waits


def test_offloaded_activations_are_copied_without_a_wait(library_folder: Path) -> None:
    """One layer, two micro-batches: its input goes to pinned memory and back."""
    steps = counts_of("training", library_folder)["sft"]
    offloaded = steps["offloaded"]["micro"]
    kept = steps["all"]["micro"]
    assert num_waits(offloaded) == num_waits(kept), offloaded["host_syncs"]
    assert sum(offloaded["copies_to_host"].values()) - sum(kept["copies_to_host"].values()) == 2
    assert sum(offloaded["copies_to_device"].values()) - sum(kept["copies_to_device"].values()) == 2


@pytest.mark.parametrize("algorithm", list(WAITS_PER_TRAINING_STEP))
def test_recomputation_repeats_the_layers_and_not_the_head(algorithm: str, library_folder: Path) -> None:
    steps = counts_of("training", library_folder)[algorithm]
    recomputed = steps["all"]["micro"]["launches_by_op"]
    kept = steps["none"]["micro"]["launches_by_op"]
    added = {op: count - kept.get(op, 0) for op, count in recomputed.items()}
    assert min(added.values()) >= 0
    assert added["rsqrt"] > 0 and added["silu"] > 0, "norms and activations are not computed again"
    for op in ("exp", "gather", "amax"):
        assert added.get(op, 0) == 0, f"{op} of the head is computed again"


@pytest.mark.parametrize("family", ["qwen2.5-7b", "qwen3-8b", "mistral-7b"])
def test_other_families_wait_as_llama_does(family: str, library_folder: Path) -> None:
    step = counts_of("families", library_folder)[family]
    collect, micro, rest = WAITS_PER_TRAINING_STEP["grpo"]
    waits = [num_waits(step[phase]) for phase in ("collect", "micro", "rest")]
    assert waits == [collect, 2 * micro, rest], step


@pytest.mark.parametrize("name", list(WAITS_PER_STEP))
def test_host_waits_of_a_decoding_step(name: str, library_folder: Path) -> None:
    """A step between two reads of the host has none; a chat reads each token."""
    step = counts_of("decoding", library_folder)[name]
    assert num_waits(step) == WAITS_PER_STEP[name], step["host_syncs"]
    assert sum(step["copies_to_device"].values()) == COPIES_PER_STEP[name], step["copies_to_device"]


@pytest.mark.parametrize(
    ("batch", "stack"),
    [*((batch, "one adapter") for batch in MIN_TOKENS_PER_SECOND), (64, "two adapters")],
)
def test_counted_time_of_a_decoding_step(batch: int, stack: str, library_folder: Path) -> None:
    one, two = counts_of("step times", library_folder)[f"{batch} rows, {stack}"]
    assert two["launches"] - one["launches"] <= MAX_LAUNCHES_PER_LAYER[batch], two["launches_by_op"]
    layer = two["gpu_seconds"] - one["gpu_seconds"]
    seconds = one["gpu_seconds"] + (NUM_LAYERS - 1) * layer + LAUNCH_SECONDS
    assert batch / seconds >= MIN_TOKENS_PER_SECOND[batch]


NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)


@pytest.mark.parametrize(
    ("program", "launches", "num_bytes", "flops"),
    [
        ("product", 1, 2 * (15 + 35 + 21), 2 * 3 * 5 * 7),
        # The expanded row is read once.
        ("add_expanded", 1, 4 * (8 + 32 + 32), 0),
        ("views", 0, 0, 0),
        ("gather_rows", 1, 2 * 4 * 16, 0),
        ("gemm_4bit of 1 row", 1, 4096 * 4096 * NF4 + 2 * (4096 + 4096), 2 * 4096 * 4096),
        # Unpacked by three kernels to two bytes a weight, which the product reads.
        (
            "gemm_4bit of 2048 rows",
            4,
            4096 * 4096 * (NF4 + 2 + 2) + 2 * 2048 * (4096 + 4096),
            2 * 2048 * 4096 * 4096,
        ),
    ],
)
def test_counted_work(
    program: str,
    launches: int,
    num_bytes: float,
    flops: float,
    library_folder: Path,
) -> None:
    counted = counts_of("checks", library_folder)["counted"][program]
    assert (counted["launches"], counted["flops"]) == (launches, flops)
    assert counted["bytes"] == pytest.approx(num_bytes, rel=1e-12)
    assert counted["host_syncs"] == counted["copies"] == 0


def test_attention_computes_half_of_the_scores_without_a_mask(library_folder: Path) -> None:
    """1 row, 2 heads, 16 x 16 scores, 8 numbers a head, two products of 2 FLOPs."""
    counted = counts_of("checks", library_folder)["counted"]
    assert counted["attention with a mask"]["flops"] == 4 * 2 * 16 * 16 * 8
    assert counted["flash attention"]["flops"] == 2 * 2 * 16 * 16 * 8


@pytest.mark.parametrize("program", ["item", "tolist", "bool", "nonzero", "cpu"])
def test_a_read_is_a_wait_with_its_place(program: str, library_folder: Path) -> None:
    counted = counts_of("checks", library_folder)["counted"][program]
    assert (counted["host_syncs"], counted["copies"]) == (1, 0)
    assert [place.partition(":")[0] for place in counted["places"]] == ["lowrank_tune/batch.py"]


@pytest.mark.parametrize("program", ["mask_index", "equal"])
def test_a_mask_as_an_index_and_a_comparison_are_waits(program: str, library_folder: Path) -> None:
    assert counts_of("checks", library_folder)["counted"][program]["host_syncs"] == 1


def test_a_copy_to_the_device_is_no_wait(library_folder: Path) -> None:
    counted = counts_of("checks", library_folder)["counted"]["to the device"]
    assert (counted["host_syncs"], counted["copies"]) == (0, 1)


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("two dtypes", "MismatchError"),
        ("two dtypes stored", "MismatchError"),
        ("two dtypes attended", "MismatchError"),
        ("two devices", "MismatchError"),
        ("embedded on the CPU", "MismatchError"),
        ("indexed on the CPU", "MismatchError"),
        ("stored from the CPU", "MismatchError"),
        ("indices of the CPU", ""),
        ("a number of the CPU", ""),
        ("unknown mask", "UnknownValues"),
        ("written mask", "UnknownValues"),
    ],
)
def test_a_planted_mismatch_is_found(program: str, error: str, library_folder: Path) -> None:
    assert counts_of("checks", library_folder)["refused"][program] == error


def test_integers_keep_their_values(library_folder: Path) -> None:
    assert counts_of("checks", library_folder)["values"] == [1 + 3 + 5 + 2 * 10, [2, 1]]


def test_a_planted_read_in_a_training_step_is_found(library_folder: Path) -> None:
    planted = counts_of("checks", library_folder)["planted"]
    assert planted["planted"] == planted["plain"] + 1
    assert planted["left on the CPU"] == 1


def test_flops_of_a_training_step(library_folder: Path) -> None:
    """2 rows of 32 tokens, 62 of them scored, one layer of Llama-3.1-8B with LoRA of rank 16, nothing recomputed."""
    linears = {
        "q": (4096, 4096),
        "k": (4096, 1024),
        "v": (4096, 1024),
        "o": (4096, 4096),
        "gate": (4096, 14336),
        "up": (4096, 14336),
        "down": (14336, 4096),
    }
    tokens, rank = 64, 16
    products = 0
    for name, (inputs, outputs) in linears.items():
        # The embedding before q, k and v has no gradient.
        has_input_gradient = name not in "qkv"
        products += 2 * tokens * inputs * outputs * (1 + has_input_gradient)
        # Forward; the gradients of A and B; the gradient of what is between them; that of the input.
        products += 2 * tokens * rank * (inputs + outputs + inputs + outputs + outputs + inputs * has_input_gradient)
    # Logits, and the head's weights expected under them.
    products += 2 * (2 * 62 * 128_256 * 4096)
    # Two products of causal scores forward, five backward: 2 rows, 32 heads, 32 x 32 scores, 128 numbers a head.
    attention = 2 * 2 * 32 * 32 * 32 * 128 // 2 * (2 + 5)
    flops = counts_of("checks", library_folder)["step"]
    assert flops["product"] + flops["fused 4-bit product"] == products
    assert flops["flash attention"] == attention


@pytest.mark.parametrize("is_ci", [False, True])
def test_a_build_server_fails_without_a_compiler(is_ci: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fake_guard.COMPILER", "no-such-compiler")
    monkeypatch.delenv("CI", raising=False)
    if is_ci:
        monkeypatch.setenv("CI", "1")
    with pytest.raises(BaseException, match="no-such-compiler") as caught:
        require_fake_gpu()
    expected = pytest.fail.Exception if is_ci else pytest.skip.Exception
    assert caught.type is expected
