"""TRL's trainers over the base with the SFT adapter merged: the same weights as ours, in one matrix each, which is the
cheapest form for TRL, and its reference is then the model without adapter."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from typing import Any

from learning_curves import setup
from learning_curves.meter import Meter
from learning_curves.reward import score
from learning_curves.task import ALPHA, EPSILON, LOGGING_STEPS, MAX_GRAD_NORM, MAX_NEW_TOKENS, RANK, TEMPERATURE, Task


def common_settings(task: Task, out: str) -> dict[str, Any]:
    """Returns the settings that both trainers have."""
    settings = task.settings
    return {
        "output_dir": out,
        "max_steps": settings.steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "beta": settings.beta,
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": MAX_GRAD_NORM,
        "optim": "adamw_torch_fused",
        "seed": task.seed,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": LOGGING_STEPS,
        "report_to": "none",
        "save_strategy": "no",
        "pad_to_multiple_of": None,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }


def model_of(task: Task) -> Any:
    """Returns the base with the SFT adapter merged, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(task.merged, dtype=torch.float32, attn_implementation="sdpa")


def lora() -> Any:
    """Returns the configuration of the fresh adapter."""
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0)


def callback_of(meter: Meter, value: Callable[[], float]) -> Any:
    """Returns a callback that counts the steps of a trainer."""
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            meter.start_training()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.end_step(value())

    return Steps()


def begin_with_first_adapter(task: Task, meter: Meter, model: Any) -> None:
    """Loads the first adapter, and makes the meter save this model's."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(task.first_adapter))

    def tensors() -> dict[str, Any]:
        return dict(get_peft_model_state_dict(model, save_embedding_layers=False))

    meter.tensors = tensors


def grpo(task: Task, meter: Meter) -> None:
    """GRPOTrainer with transformers' `generate`; it reads the prompts as text and tokenizes them to the same ids."""
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    datasets.disable_progress_bars()
    settings = task.settings
    template = setup.template_of(setup.recipe_of("grpo", task.seed, 1))
    tokenizer, rewards = template.tokenizer, []
    model = model_of(task)
    stop_ids = frozenset({model.generation_config.eos_token_id, *template.end_ids})
    model.generation_config.eos_token_id = sorted(stop_ids)
    prompts = task.units()
    assert tokenizer([prompt.text for prompt in prompts]).input_ids == [prompt.ids for prompt in prompts]

    def reward(completion_ids: list[list[int]], gold: list[str], **_: Any) -> list[float]:
        scores = [score(template, stop_ids, ids, answer) for ids, answer in zip(completion_ids, gold, strict=True)]
        rewards.append(statistics.mean(scores))
        return scores

    def last_reward() -> float:
        return rewards[-1]

    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            **common_settings(task, out),
            per_device_train_batch_size=settings.micro,
            gradient_accumulation_steps=max(1, settings.units * settings.num_generations // settings.micro),
            num_generations=settings.num_generations,
            max_completion_length=MAX_NEW_TOKENS,
            shuffle_dataset=False,
            disable_dropout=True,
            temperature=TEMPERATURE,
            loss_type="grpo",
            epsilon=EPSILON,
        )
        rows = datasets.Dataset.from_list([{"prompt": prompt.text, "gold": prompt.gold} for prompt in prompts])
        trainer = GRPOTrainer(
            model,
            reward,
            args=config,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=lora(),
            callbacks=[callback_of(meter, last_reward)],
        )
        begin_with_first_adapter(task, meter, trainer.model)
        trainer.train()


def dpo(task: Task, meter: Meter) -> None:
    """DPOTrainer, with the log-probs of the reference computed before the first step."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    datasets.disable_progress_bars()
    settings, losses = task.settings, []

    class Counted(DPOTrainer):  # type: ignore[misc]
        """Reads tokenized rows, keeps the loss of each step, and counts the reference's log-probs."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *arguments: Any, **named: Any) -> Any:
            with meter.counted():
                return super()._precompute_ref_logps(*arguments, **named)

        def compute_loss(self, *arguments: Any, **named: Any) -> Any:
            loss = super().compute_loss(*arguments, **named)
            losses.append(loss.detach())
            return loss

    def last_loss() -> float:
        return float(losses[-1])

    with tempfile.TemporaryDirectory() as out:
        config = DPOConfig(
            **common_settings(task, out),
            per_device_train_batch_size=settings.micro,
            train_sampling_strategy="sequential",
            max_length=None,
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, settings.sft_coef],
            precompute_ref_log_probs=True,
        )
        rows = [
            {"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected}
            for pair in task.units()
        ]
        trainer = Counted(
            model_of(task),
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=setup.template_of(setup.recipe_of("dpo", task.seed, 1)).tokenizer,
            peft_config=lora(),
            callbacks=[callback_of(meter, last_loss)],
        )
        begin_with_first_adapter(task, meter, trainer.model)
        trainer.train()
