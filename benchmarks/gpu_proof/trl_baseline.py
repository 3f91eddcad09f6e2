"""TRL's trainers over the same base, rows and sizes: memory and seconds per step. Only where TRL and `datasets` are
installed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any

from gpu_proof.cells import Cell
from gpu_proof.machine import peak_gib, release_unused, reserved_gib, reset_peak, synchronize
from gpu_proof.measured_run import mean
from gpu_proof.records import Record
from gpu_proof.synthetic import STEPS, AdapterSettings, TrainSettings, full_rows
from lowrank_tune.model.base import Base, nf4_config


def missing_packages() -> list[str]:
    """Return what TRL's side needs and is not installed."""
    return [name for name in ("trl", "datasets") if find_spec(name) is None]


def step_timer(seconds: list[float], base: Base) -> Any:
    """Return a callback that appends the duration of each step."""
    from transformers import TrainerCallback  # imported with TRL, where that is installed

    class StepTimer(TrainerCallback):
        started = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            release_unused(base.device)
            reset_peak(base.device)
            self.restart()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize(base.device)
            seconds.append(time.perf_counter() - self.started)
            self.restart()

        def restart(self) -> None:
            self.started = time.perf_counter()

    return StepTimer()


@dataclass
class TrainerInputs:
    """What a trainer of TRL needs."""

    cell: Cell
    base: Base
    output_dir: str
    seconds: list[float] = field(default_factory=list)

    @property
    def vocab_size(self) -> int:
        return int(self.base.model.config.vocab_size)

    def arguments(self) -> dict[str, Any]:
        on_gpu, cell = self.base.device.type == "cuda", self.cell
        return {
            "output_dir": self.output_dir,
            "max_steps": STEPS,
            "per_device_train_batch_size": cell.micro,
            "gradient_accumulation_steps": cell.units // cell.micro,
            "learning_rate": TrainSettings.learning_rate,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "optim": "adamw_torch_fused",
            "gradient_checkpointing": cell.checkpointing == "all",
            "bf16": on_gpu,
            "use_cpu": not on_gpu,
            "logging_steps": 100,
            "report_to": "none",
            "save_strategy": "no",
            "pad_to_multiple_of": None,
            "dataloader_pin_memory": False,
            "disable_tqdm": True,
        }

    def trained(self) -> dict[str, Any]:
        from peft import LoraConfig

        lora = LoraConfig(
            r=AdapterSettings.r,
            lora_alpha=int(AdapterSettings.lora_alpha),
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            lora_dropout=0.0,
        )
        timer = step_timer(self.seconds, self.base)
        return {"peft_config": lora, "callbacks": [timer], "processing_class": number_tokenizer(self.vocab_size)}

    def rows(self) -> list[list[int]]:
        """Return the token ids of the rows of all steps."""
        return full_rows(self.cell.size, self.vocab_size).input_ids.tolist() * STEPS


def number_tokenizer(size: int) -> Any:
    """Return a tokenizer whose words are numbers. Its end token is an id that the model cannot generate."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, **{str(token): token for token in range(1, size)}, "<end>": size}
    tokenizer = Tokenizer(models.WordLevel(vocab, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def sft(inputs: TrainerInputs) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"input_ids": ids, "labels": ids} for ids in inputs.rows()]
    config = SFTConfig(**inputs.arguments(), max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    return SFTTrainer(inputs.base.model, config, train_dataset=Dataset.from_list(rows), **inputs.trained())


def dpo(inputs: TrainerInputs) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class TokenizedDPOTrainer(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    rows = inputs.rows()
    pairs = []
    for chosen, rejected in zip(rows[::2], rows[1::2], strict=True):
        pairs.append({"prompt_ids": chosen[:1], "chosen_ids": chosen[1:], "rejected_ids": rejected[1:]})
    config = DPOConfig(**inputs.arguments(), max_length=None, precompute_ref_log_probs=True)
    dataset = Dataset.from_list(pairs)
    return TokenizedDPOTrainer(inputs.base.model, args=config, train_dataset=dataset, **inputs.trained())


def grpo(inputs: TrainerInputs) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def mean_token_id(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(ids) / len(ids) for ids in completion_ids]

    size = inputs.cell.size
    inputs.base.model.generation_config.eos_token_id = inputs.vocab_size  # only its length ends a completion
    prompts = [{"prompt": " ".join(map(str, ids[: size.prompt]))} for ids in inputs.rows()[:: size.num_generations]]
    config = GRPOConfig(
        **inputs.arguments(),
        num_generations=size.num_generations,
        max_completion_length=size.max_new_tokens,
        shuffle_dataset=False,
        beta=0.05,
        temperature=1.0,
        loss_type="grpo",
        epsilon=0.2,
    )
    dataset = Dataset.from_list(prompts)
    return GRPOTrainer(inputs.base.model, mean_token_id, args=config, train_dataset=dataset, **inputs.trained())


TRAINERS: dict[str, Callable[[TrainerInputs], Any]] = {"sft": sft, "grpo": grpo, "dpo": dpo}
"""TRL has no PPO any more, and its reward trainer needs a model of another class."""


def measure(cell: Cell, base: Base) -> Record:
    """Return the record of TRL's trainer, as `cells.measure` does. It leaves its adapter in the base: build a base for
    each cell.

    Any error of TRL becomes `failed`.
    """
    from datasets import disable_progress_bars
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    record: Record = {"kind": "cell", "side": "TRL", "cell": cell.name, **asdict(cell), "base": base.name}
    disable_progress_bars()
    base.model.hf_quantizer = Bnb4BitHfQuantizer(
        nf4_config(base.device)
    )  # the Trainer reads it to see that QLoRA is possible
    with tempfile.TemporaryDirectory() as output_dir:
        inputs = TrainerInputs(cell, base, output_dir)
        try:
            trainer = TRAINERS[cell.algorithm](inputs)
            trainer.train()
        except Exception as error:
            return record | {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    return record | {
        "measured_gib": peak_gib(base.device),
        "reserved_gib": reserved_gib(base.device),
        "seconds_per_step": mean(inputs.seconds[1:]),
    }
