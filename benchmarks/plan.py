"""The memory planner against what a run holds: `python benchmarks/plan.py`.

For tiny models of five shapes and all algorithms, two optimizer steps of the real loop on the CPU, and a rollout of the
real engine, under torch's profiler: bytes are the sums of the records of the CPU allocator, over what was alive before
(storages of all tensors that Python's garbage collector knows). Beside it what the planner says, told to plan for the
CPU. Nothing here is the planner's but the line that asks it.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from lowrank_tune import Recipe
from lowrank_tune.algorithms.base import AlgorithmContext
from lowrank_tune.algorithms.rollouts import RolloutCollector, RolloutGroups
from lowrank_tune.assembly import load_roles, make_algorithm
from lowrank_tune.batch import Batch, PairBatch, RolloutBatch
from lowrank_tune.generation import Engine
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.memory_planner.planner import make_spec, phases_of
from lowrank_tune.model import chunked_mlp
from lowrank_tune.model.base import load_base
from lowrank_tune.training.trainer import Trainer, make_optimizer

CPU = torch.device("cpu")
PROMPT, NEW, LENGTH, MICRO, GROUP, PROMPTS, SLOTS = 32, 64, 96, 3, 4, 3, 8
COMMON = {
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {"tie_word_embeddings": False, "sliding_window": None, "num_key_value_heads": 1},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False, "head_dim": 48},
    "gemma2": {"tie_word_embeddings": True, "head_dim": 32, "query_pre_attn_scalar": 32, "num_key_value_heads": 1},
}
LOOP = {"measuring KL", "update", "update of the value", "optimizer", "old and reference", "first check"}
"""Phases that two steps of the loop go through."""


def held() -> int:
    """Bytes of all storages that any tensor of this process keeps alive."""
    found: dict[int, int] = {}
    with warnings.catch_warnings():
        # lazily imported modules are objects too, and some of them warn when they are looked at
        warnings.simplefilter("ignore")
        for one in gc.get_objects():
            if isinstance(one, torch.Tensor) and one.device.type == "cpu":
                storage = one.untyped_storage()
                found[storage.data_ptr()] = max(found.get(storage.data_ptr(), 0), storage.nbytes())
    return sum(found.values())


def peak_of(work: Callable[[], Any]) -> int:
    """The most bytes that were alive at once while `work` ran, what was there before included."""
    gc.collect()
    before = held()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    total = highest = 0
    records = record.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((one for one in records if one.name() == "[memory]"), key=lambda one: one.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    return before + highest


def saved_model(kind: str, folder: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **COMMON | SHAPES[kind])
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def recipe_of(algorithm: str, model: str, checkpointing: bool | int, bits: int = 4, mlp_chunks: int = 1) -> Recipe:
    pairs, online = algorithm in ("reward", "dpo"), algorithm in ("grpo", "ppo")
    data: dict[str, Any] = {"train": [{"dataset": "builtin:arithmetic-preferences" if pairs else "builtin:arithmetic"}]}
    train: dict[str, Any] = {
        "max_steps": 2,
        "micro_batch_size": MICRO,
        "gradient_checkpointing": checkpointing,
        "logging_steps": 1,
        "mlp_chunks": mlp_chunks,
    }
    more: dict[str, Any] = {}
    if online:
        data["max_prompt_length"], train["prompts_per_step"] = PROMPT, PROMPTS
        more = {
            "rewards": [{"name": "answer"}],
            "rollout": {"num_generations": GROUP, "max_new_tokens": NEW, "max_num_seqs": SLOTS},
        }
    else:
        data["max_length"], train["global_batch_size"] = LENGTH, 2 * MICRO
    return Recipe.from_dict(
        {"algorithm": algorithm, "base": {"model": model, "bits": bits}, "data": data, "train": train, **more}
    )


def rows(count: int, prompt: int, family: int) -> Batch:
    """Rows of one length; families share a prompt."""
    ids = torch.randint(3, 900, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    ids[:, :prompt] = ids[torch.arange(count) // family * family, :prompt]
    completion_mask = torch.ones_like(ids, dtype=torch.bool)
    completion_mask[:, :prompt] = False
    batch = Batch(ids, torch.ones_like(completion_mask), completion_mask)
    if family > 1:
        batch.shared_prefix = torch.tensor([0 if row % family == 0 else prompt for row in range(count)])
    return batch


class FixedCollector(RolloutCollector):
    """Completions that were written before."""

    def collect(self, step: int, draw: int, count: int | None = None) -> RolloutGroups:
        batch = RolloutBatch(
            **rows(PROMPTS * GROUP, PROMPT, GROUP).tensors(),
            sampler_logps=torch.full((PROMPTS * GROUP, LENGTH), -7.0),
        )
        rewards = torch.rand(PROMPTS, GROUP, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        return RolloutGroups(
            batch=batch,
            rewards=rewards,
            reward_components=rewards.view(-1, 1),
            truncated=torch.zeros(len(batch), dtype=torch.bool),
            reward_names=["all"],
            texts=[""] * len(batch),
            prompts=[],
        )


def learned(parameters: list[torch.nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """The optimizer after a step that changed nothing."""
    optimizer = make_optimizer(parameters, recipe.train, CPU)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def measured(recipe: Recipe, rollout: bool = False, packed: bool = False) -> int:
    """The peak of two real steps; or of a real rollout. Rows are padded, as they are planned, unless `packed`."""
    base = load_base(recipe.base, SimpleNamespace(eos_token_id=1), CPU)
    roles, count = load_roles(recipe, base, {}, lambda event: None), 2 * MICRO
    roles.decoder.packed_rows.enabled = packed
    if rollout:
        moments = learned(roles.parameters("policy"), recipe)  # as from the second step on
        engine, sampling = Engine(roles, "policy", SLOTS, scratch_bytes=1 << 40), SamplingParams(NEW, frozenset())
        found = peak_of(lambda: list(engine.generate([[7] * PROMPT] * PROMPTS, GROUP, sampling)))
        del moments
        return found
    if recipe.algorithm == "sft":
        context = AlgorithmContext(roles, lambda step: rows(count, 1, 1))
    else:
        reference = torch.zeros(2 * count) if recipe.algorithm == "dpo" else None

        def pairs(step: int) -> PairBatch:
            return PairBatch(
                **rows(2 * count, 0, 2).tensors(),
                margin=torch.zeros(2 * count),
                row_indices=torch.arange(2 * count),
                reference_sequence_logps=reference,
            )

        context = AlgorithmContext(roles, pairs)
    if recipe.is_online:
        collector = FixedCollector(
            roles=roles,
            prompts=None,  # type: ignore[arg-type]
            reward_client=None,  # type: ignore[arg-type]
            reward_names=["all"],
            reward_weights=[1.0],
            decode=str,
            stop_ids=frozenset(),
            pad_id=0,
            num_generations=GROUP,
            max_new_tokens=NEW,
            temperature=1.0,
            max_num_seqs=SLOTS,
            micro_tokens=4096,
            seed_of=int,
        )
        algorithm: Any = make_algorithm(recipe, context, collector)
        algorithm.settings = algorithm.settings.model_copy(update={"max_logprob_mismatch": 1e9})
    else:
        algorithm = make_algorithm(recipe, context)
    parameters = [
        parameter for role in (recipe.trained_adapter, *recipe.extra_adapters) for parameter in roles.parameters(role)
    ]
    optimizer = make_optimizer(parameters, recipe.train, CPU)
    checked = recipe.algorithm == "dpo"  # its reference is made up
    loop = Trainer(
        algorithm,
        parameters,
        optimizer,
        recipe.train,
        2,
        0,
        CPU,
        lambda event: None,
        lambda progress, last: None,
        checked=checked,
    )
    return peak_of(loop.run)


def planned(recipe: Recipe, rollout: bool = False) -> int:
    """What the planner says of the same."""
    scene = make_spec(recipe, CPU, {})
    scene = replace(scene, sizes=replace(scene.sizes, num_rollouts=PROMPTS * GROUP if recipe.is_online else 0))
    return max(
        phase.total
        for phase in phases_of(scene)
        if (phase.name == "rollout") == rollout and (rollout or phase.name in LOOP)
    )


def cells(
    shapes: list[str], algorithms: list[str], settings: list[bool | int], mlp_chunks: list[int], packed: bool
) -> Iterator[tuple[str, str, str, int, int]]:
    """Shape, algorithm, recomputation, bytes measured, bytes planned."""
    for shape in shapes:
        with tempfile.TemporaryDirectory() as folder:
            saved_model(shape, folder)
            for algorithm in algorithms:
                if algorithm == "rollout":
                    recipe = recipe_of("grpo", folder, True)
                    yield shape, "rollout", "", measured(recipe, True), planned(recipe, True)
                    continue
                for setting, chunks in product(settings, mlp_chunks):
                    recipe = recipe_of(algorithm, folder, setting, mlp_chunks=chunks)
                    layers = {True: "all", False: "none"}.get(setting, str(setting))
                    if chunks > 1:
                        layers += f", MLPs in {chunks} chunks"
                    yield shape, algorithm, layers, measured(recipe, packed=packed), planned(recipe)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--algorithms", nargs="+", default=["sft", "reward", "dpo", "grpo", "ppo", "rollout"])
    parser.add_argument("--layers", nargs="+", default=["all", "none", "2"], help="layers that are recomputed")
    parser.add_argument("--mlp-chunks", nargs="+", type=int, default=[1], help="chunks of the MLPs")
    parser.add_argument("--packed", action="store_true", help="measure packed rows; plans are for padded ones")
    wanted = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    chunked_mlp.MIN_CHUNK_TOKENS = 1  # the rows are short
    settings: list[bool | int] = [
        {"all": True, "none": False}[one] if one in ("all", "none") else int(one) for one in wanted.layers
    ]
    print("| shape | algorithm | recomputed | measured, MiB | planned, MiB | off by |\n|---|---|---|---|---|---|")
    worst = 0.0
    for shape, algorithm, layers, found, predicted in cells(
        wanted.shapes, wanted.algorithms, settings, wanted.mlp_chunks, wanted.packed
    ):
        worst = max(worst, abs(predicted / found - 1))
        print(
            f"| {shape} | {algorithm} | {layers} | {found / 2**20:.2f} | {predicted / 2**20:.2f} | "
            f"{predicted / found - 1:+.2%} |",
            flush=True,
        )
    print(f"\nworst: {worst:.2%}")


if __name__ == "__main__":
    main()
