"""TRL's trainers over the same base, rows and sizes: what they take, and how long a step lasts. Only where TRL and `datasets` are installed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

from card.cells import Cell
from card.course import mean
from card.machine import free, peak_gib, reserved_gib, reset_peak, synchronise
from card.made import STEPS, Adapter, Train, full_rows
from lowrank_tune.model.base import Base, nf4

RANK, RATE = Adapter.r, Train.learning_rate


def missing() -> list[str]:
    """What TRL's side needs and is not installed."""
    return [name for name in ("trl", "datasets") if find_spec(name) is None]


def callback(seconds: list[float], device: torch.device) -> Any:
    """Notes how long each step lasts."""
    from transformers import TrainerCallback  # with TRL, where that is there

    class Steps(TrainerCallback):
        begun = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            free(device)
            reset_peak(device)
            self.restart()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronise(device)
            seconds.append(time.perf_counter() - self.begun)
            self.restart()

        def restart(self) -> None:
            self.begun = time.perf_counter()

    return Steps()


@dataclass
class Turn:
    """What one trainer needs of us."""

    cell: Cell
    base: Base
    out: str
    seconds: list[float] = field(default_factory=list)

    def arguments(self) -> dict[str, Any]:
        card, cell = self.base.device.type == "cuda", self.cell
        return dict(output_dir=self.out, max_steps=STEPS, per_device_train_batch_size=cell.micro,
                    gradient_accumulation_steps=cell.units // cell.micro, learning_rate=RATE, lr_scheduler_type="constant", warmup_steps=0,
                    weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch_fused", gradient_checkpointing=cell.checkpointing == "all",
                    bf16=card, use_cpu=not card, logging_steps=100, report_to="none", save_strategy="no", pad_to_multiple_of=None,
                    dataloader_pin_memory=False, disable_tqdm=True)  # fmt: skip

    def trained(self) -> dict[str, Any]:
        from peft import LoraConfig

        lora = LoraConfig(r=RANK, lora_alpha=int(Adapter.alpha), target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0)
        return dict(peft_config=lora, callbacks=[callback(self.seconds, self.base.device)], processing_class=words(self.vocabulary))

    @property
    def vocabulary(self) -> int:
        return int(self.base.model.config.vocab_size)

    def rows(self) -> list[list[int]]:
        """Ids of the rows of all steps."""
        return full_rows(self.cell.size, self.vocabulary).ids.tolist() * STEPS


def words(size: int) -> Any:
    """A tokenizer whose words are numbers; its end is an id after all that the model can say."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, **{str(token): token for token in range(1, size)}, "<end>": size}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def sft(turn: Turn) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"input_ids": ids, "labels": ids} for ids in turn.rows()]
    config = SFTConfig(**turn.arguments(), max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    return SFTTrainer(turn.base.model, config, train_dataset=Dataset.from_list(rows), **turn.trained())


def dpo(turn: Turn) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Tokenised(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    rows = turn.rows()
    pairs = [{"prompt_ids": chosen[:1], "chosen_ids": chosen[1:], "rejected_ids": rejected[1:]}
             for chosen, rejected in zip(rows[::2], rows[1::2], strict=True)]  # fmt: skip
    config = DPOConfig(**turn.arguments(), max_length=None, precompute_ref_log_probs=True)
    return Tokenised(turn.base.model, args=config, train_dataset=Dataset.from_list(pairs), **turn.trained())


def grpo(turn: Turn) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def mean_id(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(ids) / len(ids) for ids in completion_ids]

    size = turn.cell.size
    turn.base.model.generation_config.eos_token_id = turn.vocabulary  # nothing ends a completion but its length
    prompts = [{"prompt": " ".join(map(str, ids[: size.prompt]))} for ids in turn.rows()[:: size.completions]]
    config = GRPOConfig(**turn.arguments(), num_generations=size.completions, max_completion_length=size.new, shuffle_dataset=False, beta=0.05,
                        temperature=1.0, loss_type="grpo", epsilon=0.2)  # fmt: skip
    return GRPOTrainer(turn.base.model, mean_id, args=config, train_dataset=Dataset.from_list(prompts), **turn.trained())


TRAINERS: dict[str, Callable[[Turn], Any]] = {"sft": sft, "dpo": dpo, "grpo": grpo}
"""TRL has no PPO any more; its reward trainer wants a model of another class, which is not what is measured here."""


def measure(cell: Cell, base: Base) -> dict[str, Any]:
    """One record, as `cells.measure`'s, of TRL's trainer. It leaves its adapter in the base: one cell for each base."""
    from datasets import disable_progress_bars
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    record: dict[str, Any] = {"cell": cell.name, **asdict(cell), "side": "TRL"}
    disable_progress_bars()
    base.model.hf_quantizer = Bnb4BitHfQuantizer(nf4(base.device))  # which the Trainer asks whether such a model can be trained
    with tempfile.TemporaryDirectory() as out:
        turn = Turn(cell, base, out)
        try:
            trainer = TRAINERS[cell.algorithm](turn)
            trainer.train()
        except torch.OutOfMemoryError as error:
            return record | {"failed": f"out of memory: {str(error).splitlines()[0]}"}
    return record | {"measured GiB": peak_gib(base.device), "reserved GiB": reserved_gib(base.device), "seconds a step": mean(turn.seconds[1:])}
