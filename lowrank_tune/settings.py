"""Every setting of a recipe: typed, strict, frozen, with its default and its meaning. No torch here: a fault is told in a second.

Names are those that users of the Hugging Face libraries already know. `recipe.py` reads them from YAML.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

T = TypeVar("T")


def _some(entries: tuple[T, ...]) -> tuple[T, ...]:
    """Not empty. Pydantic's own `min_length` would hide the faults of the entries behind a fault of the list."""
    if not entries:
        raise PydanticCustomError("too_short", "must have at least one entry")
    return entries


NOT_EMPTY = (Field(strict=False, json_schema_extra={"minItems": 1}), AfterValidator(_some))

Positive = Annotated[int, Field(ge=1, le=1_000_000_000_000)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Line = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f]+$")]
Words = Annotated[tuple[Line, ...], *NOT_EMPTY]
RunName = Annotated[str, Field(pattern=r"^$|^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]

TRAINED = {"reward": "reward"}
"""The adapter that an algorithm trains, where it is not `policy`."""


def trained_by(algorithm: object) -> str:
    """The adapter that an algorithm trains; `policy` also for a word that is no algorithm, which is told elsewhere."""
    return TRAINED.get(algorithm, "policy") if isinstance(algorithm, str) else "policy"


ASIDE: dict[str, tuple[str, ...]] = {"ppo": ("value",)}
"""Adapters that an algorithm has for roles of their own: they lie in no policy's stack."""


def aside(algorithm: object) -> tuple[str, ...]:
    """The adapters of an algorithm that lie beside its policy's stack."""
    return ASIDE.get(algorithm, ()) if isinstance(algorithm, str) else ()


class Settings(BaseModel):
    """Unknown keys, wrong types and later changes are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Base(Settings):
    """The frozen base."""

    model: Line = "tiny-tutor"
    """A hub id, `id@revision`, a folder, or `tiny-tutor`, which ships with the package."""
    bits: Literal[4, 16] = 4
    """4: NF4 with double quantisation. 16: not quantised."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for repositories that you trust as you trust your shell."""


class Adapter(Settings):
    """One LoRA adapter. With `path` it is loaded: frozen below the policy, or continued where it is the policy's own."""

    r: Positive = 16
    """Rank."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale: the update is multiplied by alpha / r (by alpha / sqrt(r) with rslora)."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout on the adapter's input while it trains."""
    target_modules: Literal["all-linear"] | Words = "all-linear"
    """Names of the linear modules that get an adapter."""
    rslora: bool = False
    """Rank-stabilised scaling (arXiv:2312.03732)."""
    path: Line | None = None
    """Folder of an existing adapter, or of a run."""


class Source(Settings):
    """One source of rows."""

    dataset: Line
    """A hub id, `id@revision`, a file (JSON, JSON lines, CSV, Parquet; gz too), a folder, `tutor` (the built-in problems) or
    `tutor-preferences` (pairs of answers to them)."""
    name: Line | None = None
    """Configuration of a hub data set (`main` of openai/gsm8k)."""
    split: Line = "train"
    """Split of a hub data set or of the built-in ones (train, heldout)."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "question_answer", "preference"] = "auto"
    """Shape of a row. `auto` looks at the columns and says what it found. `preference` is a chosen and a rejected answer."""
    columns: dict[Line, Line] = Field(default_factory=dict)
    """Renames columns: the format's name to the data's name, as `{question: problem, answer: solution}`."""
    gold: Literal["auto", "none", "answer", "hashes", "boxed", "last_number", "gold"] = "auto"
    """Where the gold answer stands: after `####`, in the last box, the last number, the whole answer, or a column `gold`."""
    rows: Positive | None = None
    """Takes this many rows, drawn with the seed."""
    weight: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Share of the rows drawn from this source. All sources have one, and they sum to 1; or none has, and row counts decide."""


Sources = Annotated[tuple[Source, ...], Field(strict=False)]


class Data(Settings):
    """What is trained on."""

    train: Annotated[tuple[Source, ...], *NOT_EMPTY]
    """Sources of the training rows."""
    validation: Sources = ()
    """Sources of the validation rows. Without them `validation_share` of the training rows is set aside."""
    validation_share: Annotated[float, Field(ge=0.0, lt=0.9)] = 0.05
    """Share of the training rows set aside for validation; 0 for none."""
    system: str | None = None
    """A system prompt for rows that bring none."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Longest row in tokens."""
    max_prompt_length: Annotated[int, Field(ge=1)] = 512
    """Longest prompt in tokens, where completions are drawn; a longer one is dropped and counted."""
    too_long: Literal["drop", "truncate"] = "drop"
    """A longer row is dropped and counted; or cut at the last whole turn that fits, and dropped where none does. A pair is cut at the
    front: the oldest exchanges of its prompt go, the same on both sides; no answer is ever cut."""
    max_rejected_share: Share = 0.1
    """Stops before training when more than this share of the rows is unusable."""


class Train(Settings):
    """The loop."""

    steps: Positive | None = None
    """Optimizer steps. Give this or `epochs`."""
    epochs: Annotated[float, Field(gt=0.0)] | None = None
    """Passes over the training rows."""
    rows_per_step: Positive | None = None
    """Rows of one optimizer step (16 unless `tokens_per_step` is given). With preferences a row is a pair."""
    prompts_per_step: Positive = 16
    """Prompts of one optimizer step, where completions are drawn."""
    tokens_per_step: Positive | None = None
    """Or: as many rows as fit this many tokens."""
    micro_batch_size: Positive | None = None
    """Rows (completions, where they are drawn) that go through the model at once (4 unless `micro_batch_tokens` is given). Changes memory
    and speed, never the gradient."""
    micro_batch_tokens: Positive | None = None
    """Or: as many rows as fit this many tokens, padding counted."""
    length_window: Positive = 1
    """Rows are sorted by length within a window of this many steps, so that rows of a step need little padding."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 2e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the rate rises from 0."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """AdamW in fp32; bitsandbytes' 8-bit and paged ones need CUDA."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """AdamW's decoupled decay."""
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Decay of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    """Decay of the second moment."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    """Gradients are scaled down to this norm, those of a value by themselves."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more time."""
    max_bad_steps: Positive = 5
    """Stops after this many steps in a row whose loss or gradient is not finite; each is skipped and counted."""
    log_every: Positive = 10
    """Steps between lines of the console. On these steps KL to the reference is measured too, which costs forwards of a micro-batch."""
    save_every: Positive | None = None
    """Steps between checkpoints; about ten over the run where it is not given."""
    keep: Positive = 2
    """Newest checkpoints kept, besides the best."""
    final: Literal["best", "last"] = "best"
    """Which adapter becomes `final/`: the one with the lowest validation loss, or the last."""
    final_stack: Literal["folded", "apart"] = "folded"
    """Where frozen adapters lie below the trained one: `final/` is all of them folded into one adapter, exactly, whose rank is the sum of
    theirs; or each stays apart in a folder of its own, to be loaded together."""


class RewardModel(Settings):
    """What `algorithm: reward` optimises: Bradley-Terry, with the margin of a row that has one."""

    centering: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of (R+ + R-)^2, which keeps the scores around 0 (arXiv:2312.09244)."""


class Dpo(Settings):
    """What `algorithm: dpo` optimises."""

    loss: Literal["sigmoid", "ipo", "hinge", "robust", "apo_zero", "sigmoid_norm"] = "sigmoid"
    """The preference loss: of DPO (sigmoid), IPO, SLiC (hinge), robust DPO, APO-zero, or sigmoid of log-probs a token."""
    beta: Annotated[float, Field(gt=0.0)] = 0.1
    """How closely the policy is held to the reference: higher is closer."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.1
    """For `robust`: the share of pairs whose sides are taken to be the wrong way round."""
    sft: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of an SFT term on the chosen answers, against their unlearning."""


UNSAFE_CODE: Final = "code that a model wrote may do anything on this machine"


class RewardUse(Settings):
    """One reward of several. What a completion earns is the weighted sum."""

    use: Line
    """`answer` and `math_answer` (the final answer equals the gold one, exactly or as mathematics); `symbolic` (an equal expression);
    `python_tests` (the code passes the row's tests); `smt` and `lean` (proved);
    `format`, `regex`, `json_schema`, `length`, `repetition` (how it is written); `reward_model` (the learned score of `adapters.reward`);
    or your own function: `./file.py:name`."""
    weight: float = 1.0
    """What it counts for; a negative weight punishes."""
    pattern: Line | None = None
    """For `format`: the regular expression that the whole completion must match. For `regex`: that must be found in it. The engine is RE2."""
    target_tokens: Positive | None = None
    """For `length`: up to this many tokens earn 1, twice as many 0."""
    on_error: Literal["stop", "drop"] | None = None
    """Where the reward itself fails or takes too long: stop the run, or drop the completion from its group, counted and told. By default
    your own function stops the run, and a verifier of the kit drops."""
    ngram: Annotated[int, Field(ge=1, le=64)] | None = None
    """For `repetition`: of how many words the sequences are that should not come twice; 4 where it is not given."""
    json_schema: Line | dict[str, Any] | None = None
    """For `json_schema`: the JSON schema (draft 2020-12, or what its `$schema` says), written here or as `./file.json`."""
    kind: Literal["statement", "witness", "invariant"] | None = None
    """For `smt`: what a completion tells: whether the row's constraints can be met, values that meet them, or an inductive invariant."""
    program: Words | None = None
    """For `lean`: the command that checks a file; [lean] where it is not given, [lake, --dir, ./project, env, lean] for one with Mathlib."""
    accept_unsafe_code: Literal["code that a model wrote may do anything on this machine"] | None = None
    """For `python_tests`, where the machine has no sandbox for code: this sentence, word for word, lets it run without one."""


class Rollout(Settings):
    """How completions are drawn while training: always from the full distribution."""

    num_generations: Annotated[int, Field(ge=1, le=1024)] = 8
    """Completions of each prompt: a group, for grpo of 2 at least."""
    max_new_tokens: Positive = 256
    """Longest completion in tokens."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Temperature, of sampling and of all log-probs of the update."""
    slots: Positive = 64
    """Sequences that are decoded at once."""
    max_unscored_share: Share = 0.01
    """Stops the run when the rewards failed on more than this share of its completions, from the third such on."""


class Grpo(Settings):
    """What `algorithm: grpo` optimises."""

    loss: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"] = "grpo"
    """GRPO; DAPO's token mean; Dr. GRPO (no division by spread or length); GSPO (ratio of whole sequences); CISPO (clipped weights)."""
    clip: Annotated[float, Field(gt=0.0)] = 0.2
    """How far the ratio to the sampling policy may move before the gradient stops."""
    clip_low: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """The same for falling ratios alone."""
    clip_high: Annotated[float, Field(gt=0.0)] | None = None
    """The same for rising ratios alone (0.28 for `dapo`; for `cispo` the largest weight, 5)."""
    kl: Annotated[float, Field(ge=0.0)] = 0.05
    """Weight of the KL to the reference."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where it counts: in the loss a token, or in the reward a completion."""
    kl_estimator: Literal["k3_ratio", "k3", "k2", "exact"] = "k3_ratio"
    """For `kl_in: loss`: k3 times the ratio (the gradient of KL(policy || reference)), k3, k2, or exact over the whole vocabulary."""
    epochs: Positive = 1
    """Passes over each harvest of completions."""
    old: Literal["recomputed", "sampler"] = "recomputed"
    """The old log-probs of the ratio: computed again by the policy, or those of the sampler."""
    mismatch_limit: Annotated[float, Field(gt=0.0)] = 0.1
    """Nats a token between the sampler's log-probs and the policy's, at which the run stops."""
    truncated: Literal["keep", "mask", "penalise"] = "keep"
    """A completion cut by the limit is trained as it is, left out of the loss, or loses `penalty`."""
    penalty: Annotated[float, Field(gt=0.0)] = 1.0
    """For `truncated: penalise`."""
    dead_groups: Literal["keep", "drop", "resample"] = "drop"
    """A group of equal rewards has no advantage: kept for its KL, left out of the update, or replaced by other prompts."""


class Ppo(Settings):
    """What `algorithm: ppo` optimises."""

    clip: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """How far the ratio to the policy that wrote may move before the gradient stops."""
    entropy: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of an entropy bonus; it costs a second pass through the output head."""
    epochs: Positive = 4
    """Passes over each harvest of completions."""
    minibatches: Positive = 1
    """Optimizer steps of each pass, each on its share of the harvest."""
    update_kl_limit: Annotated[float, Field(gt=0.0)] | None = None
    """Nats a token between the policy that wrote and the updated one, above which the rest of a harvest's passes is left out."""
    kl: Annotated[float, Field(ge=0.0)] = 0.05
    """Weight of the KL to the reference, a part of every token's reward; with `kl_target` where it begins."""
    kl_target: Annotated[float, Field(gt=0.0)] | None = None
    """Nats a token of KL to the reference that the weight is steered to. Without it the weight stays."""
    kl_gain: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """How fast the weight is steered: by a fifth of this a step at most."""
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Discount of what is earned a token later."""
    gae_lambda: Share = 0.95
    """Generalised advantage estimation: 1 trusts what was earned, 0 the value."""
    truncated: Literal["penalise", "bootstrap", "keep"] = "penalise"
    """A completion without an end loses `penalty`; or has no score, and its value stands for what is to come; or is scored as it is."""
    penalty: Annotated[float, Field(gt=0.0)] = 1.0
    """For `truncated: penalise`."""
    value: Literal["adapter", "trunk"] = "adapter"
    """What values tokens: an adapter with a head of its own, or a head on the policy's trunk, whose loss moves the policy's adapter too."""
    value_from: Literal["policy", "reward"] = "policy"
    """Where the value's adapter begins: fresh on what lies below the policy, or as a copy of the adapter `reward` with its head, which
    then foretells the weighted score."""
    value_learning_rate: Annotated[float, Field(gt=0.0)] | None = None
    """Peak learning rate of the value; `train.learning_rate` where it is not given."""
    value_weight: Annotated[float, Field(gt=0.0)] = 0.1
    """For `value: trunk`: weight of the value's loss beside the policy's."""
    value_clip: Annotated[float, Field(ge=0.0)] = 0.2
    """How far a value may move from what it was when the harvest came, before its gradient stops; 0 for any way."""
    mismatch_limit: Annotated[float, Field(gt=0.0)] = 0.1
    """Nats a token between the sampler's log-probs and the policy's, at which the run stops."""


class Evaluate(Settings):
    """Held-out measurements while training."""

    every: Positive | None = None
    """Steps between evaluations; about ten over the run where it is not given."""
    heldout: Source | None = None
    """Prompts with gold answers: the model answers them before and after the run, and exact answers and proper stops are counted."""
    prompts: Positive = 100
    """How many of them."""
    samples: Positive = 1
    """Answers for each prompt: 1 is greedy, more are sampled and give pass@1 and pass@k."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Temperature of sampled answers."""
    max_new_tokens: Positive = 64
    """Longest answer in tokens."""
    best_by: Literal["loss", "exact"] | None = None
    """What makes a step the best: the lowest validation loss, or the most held-out questions answered exactly, one greedy answer each.
    Where it is not given: `exact` for grpo and ppo with `heldout`, else `loss`."""
    on_hacking: Literal["warn", "stop"] = "warn"
    """What to do where the reward rises and held-out answers get worse by more than their noise: say so; or end the run there too, with the
    best step as its result. For grpo and ppo with `heldout`."""
    shown: Annotated[int, Field(ge=0)] = 3
    """Prompts (held-out ones, else of validation rows) whose answers are shown at every evaluation."""


class Recipe(Settings):
    """One run, complete."""

    name: RunName = ""
    """Name of the run and of its folder under `runs/`; the recipe file's name where it is not given."""
    description: str = ""
    """One line for `lowrank-tune presets`."""
    algorithm: Literal["sft", "reward", "dpo", "ppo", "grpo"]
    """What is optimised."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seeds everything."""
    base: Base = Base()
    """The frozen base."""
    adapters: dict[str, Adapter] = Field(default_factory=dict, json_schema_extra={"propertyNames": {"pattern": "^[a-z][a-z0-9_]{0,39}$"}})
    """`policy` (for a reward model: `reward`) is trained; every other one needs a `path` and lies frozen below it, in this order. For ppo
    `value` is trained too, by default in the policy's shape; with a `path` it goes on from there."""
    reference: Line | None = None
    """What the policy is held to and compared with, as a check: `base`, or the frozen adapter right below the policy. It is always the
    policy's stack without its top; a recipe that says otherwise is refused."""
    data: Data
    """What is trained on."""
    train: Train = Train()
    """The loop."""
    reward: RewardModel = RewardModel()
    """What `algorithm: reward` optimises."""
    dpo: Dpo = Dpo()
    """What `algorithm: dpo` optimises."""
    rewards: Annotated[tuple[RewardUse, ...], Field(strict=False)] = ()
    """What completions earn."""
    rollout: Rollout = Rollout()
    """How completions are drawn while training."""
    grpo: Grpo = Grpo()
    """What `algorithm: grpo` optimises."""
    ppo: Ppo = Ppo()
    """What `algorithm: ppo` optimises."""
    evaluate: Evaluate = Evaluate()
    """Held-out measurements."""

    @property
    def trained(self) -> str:
        """The adapter that is trained."""
        return trained_by(self.algorithm)

    @property
    def aside(self) -> tuple[str, ...]:
        """The adapters that lie in no policy's stack, but for the reward model's."""
        return aside(self.algorithm)

    @property
    def pairs(self) -> bool:
        """Whether a row of the data is a chosen and a rejected answer."""
        return self.algorithm in ("reward", "dpo")

    @property
    def needs_gold(self) -> bool:
        """Whether a reward compares completions with gold answers."""
        return any(reward.use == "answer" for reward in self.rewards)

    @property
    def best_by(self) -> str:
        """What makes a step the best."""
        return self.evaluate.best_by or ("exact" if self.algorithm in ("grpo", "ppo") and self.evaluate.heldout else "loss")

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain data; `recipe.load` of it gives this recipe again."""
        return self.model_dump(mode="json", exclude_none=True)

    @model_validator(mode="before")
    @classmethod
    def _trained_by_default(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("adapters", {}), dict):
            return data
        adapters, name = data.get("adapters", {}), trained_by(data.get("algorithm"))
        return data if name in adapters else {**data, "adapters": {**adapters, name: {}}}
