"""`lowrank-tune eval` on a run made by hand: figures against other software and against counting, interruption, the
record, wrong input."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from export_fixtures import FinishedRun, make_run
from models import CPU, perturb
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lowrank_tune import UserError
from lowrank_tune.assembly.reward_model import append_end_of_turn, encode_answer, end_of_turn_ids
from lowrank_tune.cli import app
from lowrank_tune.config import AdapterConfig, BaseConfig, SourceConfig
from lowrank_tune.data import ChatTemplate
from lowrank_tune.data.message import Message
from lowrank_tune.evaluation import Options, evaluate, parse_record, read_records
from lowrank_tune.evaluation import evaluation as evaluation_module
from lowrank_tune.evaluation.evaluator import EvalResult, Evaluator
from lowrank_tune.evaluation.grading import GradedAnswer
from lowrank_tune.evaluation.metrics import win_rates
from lowrank_tune.evaluation.questions import load_eval_questions
from lowrank_tune.events import Event, Progress
from lowrank_tune.generation import Engine
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.model.adapters import lora_config
from lowrank_tune.model.base import base_hashes, load_base, load_tokenizer
from lowrank_tune.model.heads import HEAD_WEIGHT_KEY
from lowrank_tune.model.roles import Roles
from lowrank_tune.toy import problems
from lowrank_tune.ui.compare.figures import rows as compared
from lowrank_tune.ui.compare.runs import read_runs
from lowrank_tune.ui.report import write_report
from lowrank_tune.ui.views.evaluation import describe_evaluation, rows

SHORT = Options(dataset="builtin:arithmetic", num_prompts=6, num_samples=2, max_new_tokens=6)


def quiet(event: Event) -> None:
    pass


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return make_run(tmp_path_factory.mktemp("made"), bits=16)


@pytest.fixture(scope="module")
def reward_run(made: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `algorithm: reward` on the same base, with an adapter and a head that matter."""
    wanted = BaseConfig(model=str(made.base), bits=16)
    base = load_base(wanted, load_tokenizer(wanted), CPU)
    hashes = base_hashes(base.model)
    roles = Roles(
        base,
        {"reward": lora_config(AdapterConfig(r=2), base.model)},
        ["reward"],
        {"reward": ["reward"]},
        heads=["reward"],
    )
    perturb(roles, "reward", size=0.2)
    run = tmp_path_factory.mktemp("reward_run") / "run"
    (run / "final").mkdir(parents=True)
    save_file(roles.adapter_tensors("reward"), run / "final" / "adapter_model.safetensors")
    (run / "final" / "adapter_config.json").write_text(json.dumps(roles.adapter_config("reward")))
    recipe = {
        "algorithm": "reward",
        "base": {"model": str(made.base), "bits": 16},
        "train": {"max_steps": 1},
        "data": {"train": [{"dataset": "builtin:arithmetic-preferences", "max_samples": 12}]},
    }
    (run / "run.json").write_text(json.dumps({"recipe": recipe}))
    (run / "base.json").write_text(json.dumps({"device": "cpu", "bits": 16, "tensors": hashes}))
    return run


def with_rewards(made: FinishedRun, folder: Path, function: str) -> Path:
    """The same run with the recipe of one that learned from a reward of its user's own."""
    run = folder / "run"
    shutil.copytree(made.run, run)
    (folder / "mine.py").write_text(f"def mine(completion, row):\n    return {function}\n")
    recipe = json.loads((run / "run.json").read_text())["recipe"]
    recipe = {key: recipe[key] for key in ("base", "adapters", "seed")} | {
        "algorithm": "grpo",
        "train": {"max_steps": 1},
        "data": {"train": [{"dataset": "builtin:arithmetic", "max_samples": 12}]},
        "evaluate": {"eval_dataset": {"dataset": "builtin:arithmetic", "split": "heldout"}},
        "rewards": [{"name": f"{folder}/mine.py:mine", "weight": 2.0}],
    }
    (run / "run.json").write_text(json.dumps({"recipe": recipe}))
    return run


def test_losses_equal_those_of_transformers_and_peft(made: FinishedRun) -> None:
    """Another program reads the same rows with the adapter that the run left: the mean of -log p over all tokens of the
    answers."""
    found = evaluate(
        str(made.run), Options(dataset="builtin:arithmetic", num_prompts=9, max_new_tokens=2), quiet, CPU
    ).record
    wanted = BaseConfig(model=str(made.base), bits=16)
    template = ChatTemplate.from_tokenizer(load_tokenizer(wanted))
    model = AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32), made.run / "final"
    )
    rows = list(problems.rows(9, 0, heldout=True))
    for who, one in (("base", model), ("sft", tuned.eval())):
        total, tokens = 0.0, 0
        for row in rows:
            user, assistant = Message("user", row["question"]), Message("assistant", row["answer"])
            ids, start = template.encode([user, assistant]).input_ids, len(template.prompt([user]))
            with torch.no_grad():
                logps = one(input_ids=torch.tensor([list(ids)])).logits[0].double().log_softmax(dim=-1)
            total -= sum(float(logps[place - 1, ids[place]]) for place in range(start, len(ids)))
            tokens += len(ids) - start
        assert found["metrics"][who]["loss"]["value"] == pytest.approx(total / tokens, rel=1e-4)
    change = found["deltas"]["sft"]["loss"]
    assert change["value"] == pytest.approx(
        found["metrics"]["sft"]["loss"]["value"] - found["metrics"]["base"]["loss"]["value"]
    )
    assert found["metrics"]["sft"]["loss"]["value"] != found["metrics"]["base"]["loss"]["value"]


def test_rewards_pass_at_k_and_wins_equal_plain_counts(made: FinishedRun, tmp_path: Path) -> None:
    """The answers are drawn again, and every figure is worked out from them by plain counting."""
    run = with_rewards(made, tmp_path, "float(len(completion) % 3)")
    options = Options(num_prompts=7, num_samples=3, pass_at_k=(2,), max_new_tokens=5, verifier="answer")
    found = evaluate(str(run), options, quiet, CPU).record
    completions = drawn_again(made, 7, 3, 5)
    template = ChatTemplate.from_tokenizer(load_tokenizer(BaseConfig(model=str(made.base))))
    for who in ("base", "grpo"):
        values = [[2.0 * (len(template.decode(ids)) % 3) for ids in several] for several in completions[who]]
        mean = sum(sum(several) / 3 for several in values) / 7
        assert found["metrics"][who]["reward"]["value"] == pytest.approx(mean) and mean > 0
        assert found["metrics"][who]["pass_at_1"]["value"] == 0 and found["metrics"][who]["pass_at_2"]["prompts"] == 7
        assert found["metrics"][who]["pass_at_1"]["high"] == pytest.approx(0.354, abs=1e-3), "Wilson for 0 of 7"
    wins = found["wins"]["grpo"]["verifier"]
    assert (wins["value"], wins["ties"]) == (0.5, 1.0), "all wrong on both sides"
    assert found["grader"] == "answer" and found["rewards"] == {"mine": 2.0}


def drawn_again(
    made: FinishedRun, count: int, samples: int, longest: int, temperature: float = 1.0
) -> dict[str, list[list[list[int]]]]:
    """What base and policy answer to the first held-out problems (ids without a stop), each variant in one call over
    all of them."""
    wanted = BaseConfig(model=str(made.base), bits=16)
    template = ChatTemplate.from_tokenizer(load_tokenizer(wanted))
    base = load_base(wanted, template.tokenizer, CPU)
    # for its configuration alone
    tuned = PeftModel.from_pretrained(base.model, made.run / "final", adapter_name="other")
    config = tuned.peft_config["other"]
    tuned.unload()
    roles = Roles(load_base(wanted, template.tokenizer, CPU), {"policy": config}, [], {"policy": ["policy"]})
    roles.load_adapter_tensors("policy", load_file(made.run / "final" / "adapter_model.safetensors"), "final")
    questions = load_eval_questions(
        SourceConfig(dataset="builtin:arithmetic", split="heldout"), count, 0, template, None
    ).questions
    sampling = SamplingParams(longest, base.end_ids | template.end_ids, temperature, 0)
    completions: dict[str, list[list[list[int]]]] = {}
    for who, role in (("base", "base"), ("grpo", "policy")):
        several: list[list[list[int]]] = [[[] for _ in range(samples)] for _ in questions]
        for one in Engine(roles, role).generate([question.prompt_ids for question in questions], samples, sampling):
            several[one.prompt][one.sample] = one.token_ids[:-1] if one.finish_reason == "stop" else one.token_ids
        completions[who] = several
    return completions


def test_parts_and_their_order_change_no_answer(
    made: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = with_rewards(made, tmp_path, "float(len(completion))")
    options = Options(num_prompts=7, num_samples=2, max_new_tokens=6)
    whole = evaluate(str(run), options, quiet, CPU).record
    monkeypatch.setattr("lowrank_tune.evaluation.evaluator.ANSWERS_PER_BATCH", 4)
    parts = evaluate(str(run), options, quiet, CPU).record
    assert whole["metrics"]["grpo"]["reward"]["value"] == pytest.approx(
        parts["metrics"]["grpo"]["reward"]["value"], rel=1e-12
    )
    assert whole["metrics"]["base"]["mean_length"]["value"] == parts["metrics"]["base"]["mean_length"]["value"]


def test_wins_by_a_reward_model_equal_plain_counts(made: FinishedRun, reward_run: Path) -> None:
    """Greedy answers of both variants are scored again one by one, and the wins counted."""
    found = evaluate(
        str(made.run),
        Options(dataset="builtin:arithmetic", num_prompts=6, max_new_tokens=6, reward_model=reward_run),
        quiet,
        CPU,
    ).record
    wanted = BaseConfig(model=str(made.base), bits=16)
    template = ChatTemplate.from_tokenizer(load_tokenizer(wanted))
    base = load_base(wanted, template.tokenizer, CPU)
    roles = Roles(
        base,
        {"reward": lora_config(AdapterConfig(r=2), base.model)},
        [],
        {"reward": ["reward"]},
        heads=["reward"],
    )
    roles.load_adapter_tensors("reward", load_file(reward_run / "final" / "adapter_model.safetensors"), "reward_run")
    completions = drawn_again(made, 6, 1, 6, temperature=0.0)
    questions = load_eval_questions(
        SourceConfig(dataset="builtin:arithmetic", split="heldout"), 6, 0, template, None
    ).questions

    def score(number: int, answered: list[int]) -> float:
        assert len(answered) == 6, "none of them ends by itself"
        ids = [*questions[number].prompt_ids, *answered]
        with roles.inference_mode(), roles.activate("reward"):
            hidden = base.model.get_decoder()(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        return float(hidden @ roles.heads["reward"].weight[0])

    assert HEAD_WEIGHT_KEY in roles.adapter_tensors("reward")
    mine, theirs = (
        [score(number, several[0]) for number, several in enumerate(completions[who])] for who in ("grpo", "base")
    )
    wins = found["wins"]["sft"]["reward_model"]
    assert wins["value"] == pytest.approx(sum((a > b) + (a == b) / 2 for a, b in zip(mine, theirs, strict=True)) / 6)
    assert found["metrics"]["sft"]["reward_model_score"]["value"] == pytest.approx(sum(mine) / 6, rel=1e-3)
    assert found["metrics"]["base"]["reward_model_score"]["value"] == pytest.approx(sum(theirs) / 6, rel=1e-3)


def test_the_reward_model_reads_answers_to_their_end() -> None:
    """What ended by itself is scored where the reward model was trained to look, behind all that closes a turn."""
    template = ChatTemplate.from_tokenizer(load_tokenizer(BaseConfig(model="tiny-tutor")))
    ids, end = encode_answer(template, "Yes."), end_of_turn_ids(template)
    stop = next(place for place, token in enumerate(ids) if token in template.end_ids)
    assert append_end_of_turn(ids[: stop + 1], end) == ids


def test_a_chain_evaluates_every_finished_stage(made: FinishedRun, tmp_path: Path) -> None:
    chain = tmp_path / "chain"
    for number, name in ((1, "sft"), (2, "dpo")):
        shutil.copytree(made.run, chain / f"{number}-{name}")
    stages = [
        {"name": "sft", "algorithm": "sft"},
        {"name": "judge", "algorithm": "reward"},
        {"name": "dpo", "algorithm": "dpo"},
    ]
    (chain / "run.json").write_text(json.dumps({"recipe": {"name": "c", "stages": [stages[0], stages[2], stages[1]]}}))
    found = evaluate(str(chain), SHORT, quiet, CPU)
    assert list(found.record["metrics"]) == ["base", "sft", "dpo"] and found.path == chain / "evals.jsonl"
    shutil.rmtree(chain / "2-dpo" / "final")
    messages: list[str] = []
    half = evaluate(str(chain), SHORT, lambda event: messages.append(getattr(event, "message", "")), CPU)
    assert list(half.record["metrics"]) == ["base", "sft"] and any("not ended: dpo" in line for line in messages)


def eval_command(run: Path, num_prompts: int, max_new_tokens: int) -> list[str]:
    """Arguments of the command line: two answers to each of some built-in questions."""
    sizes = ["--num-prompts", str(num_prompts), "--num-samples", "2", "--max-new-tokens", str(max_new_tokens)]
    return ["eval", str(run), "--dataset", "builtin:arithmetic", *sizes]


def test_ctrl_c_keeps_the_parts_that_all_models_have_finished(
    made: FinishedRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("lowrank_tune.evaluation.evaluator.ANSWERS_PER_BATCH", 4)  # two prompts a part
    run = tmp_path / "run"
    shutil.copytree(made.run, run)

    def interrupting(after: int) -> Callable[[Event], None]:
        def on_event(event: Event) -> None:
            if isinstance(event, Progress) and event.description.startswith("evaluating") and event.done >= after:
                raise KeyboardInterrupt

        return on_event

    # two variants, two prompts, each a loss and two answers
    found = evaluate(str(run), SHORT, interrupting(2 * (2 + 4) * 2 - 1), CPU)
    assert found.interrupted and found.record["interrupted"] is True
    on = found.record["dataset"]
    assert (on["prompts"], on["planned"]) == (2, 6) or (on["prompts"], on["planned"]) == (4, 6)
    assert {figures["loss"]["prompts"] for figures in found.record["metrics"].values()} == {on["prompts"]}, (
        "the same prompts for all"
    )
    early = evaluate(str(run), SHORT, interrupting(1), CPU)
    assert early.interrupted and not evaluation_module.has_metrics(early.record)

    original = Evaluator.measure

    def interrupted(self: Evaluator, *arguments: Any) -> Any:
        self.emit = interrupting(23)
        return original(self, *arguments)

    monkeypatch.setattr(Evaluator, "measure", interrupted)
    command = eval_command(run, num_prompts=6, max_new_tokens=6)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 130 and "interrupted" in result.stdout and len(read_records(run)) == 1, result.output


def test_results_are_added_to_the_run_and_shown(made: FinishedRun, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(made.run, run)
    command = eval_command(run, num_prompts=4, max_new_tokens=4)
    for _ in range(2):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    assert "pass@1" in result.stdout and "95 % interval" in result.stdout and str(run / "evals.jsonl") in result.stdout
    lines = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(line["v"] == 2 and line["kind"] == "eval" for line in lines)
    assert lines[0]["metrics"] == lines[1]["metrics"], "the same seed gives the same figures and intervals"
    assert lines[0]["settings"] == {
        "num_prompts": 4,
        "num_samples": 2,
        "pass_at_k": [1, 2],
        "temperature": 1.0,
        "top_p": 1.0,
        "max_new_tokens": 4,
        "seed": 0,
        "confidence": 0.95,
    }
    event = {
        "v": 1,
        "event": "run_started",
        "time": 1.0,
        "name": "tried",
        "algorithm": "sft",
        "model": "m",
        "roles": {},
        "reference": "r",
        "steps": 1,
    }
    (run / "events.jsonl").write_text(json.dumps(event) + "\n")
    shutil.copytree(run, other)
    (other / "evals.jsonl").write_bytes(b'{"v": 2, "kind": "eval"}\nnot json\n[1]\n{"v": 9, "kind": "eval"}\n')
    html = write_report(run).read_text()
    assert "Evaluations" in html and "pass@1" in html and html.count("<details") >= 2
    damaged = re.escape(f"{other / 'evals.jsonl'} is damaged: 2 lines (the first is line 2) cannot be read")
    with pytest.warns(RuntimeWarning, match=damaged):
        assert write_report(other).exists(), "what anyone may have edited breaks no page"
    with pytest.warns(RuntimeWarning, match=damaged):
        table = dict(compared(read_runs([run, other])))
    assert table["eval: pass@1"][0].startswith("0.0 % (0.0 to ") and table["eval: pass@1"][1] == ""
    assert table["eval: of"][0] == "sft, builtin:arithmetic heldout" and table["eval: prompts"] == ["4", ""]


def test_an_invalid_record_is_read_without_errors_or_escape_codes() -> None:
    record = parse_record(
        {
            "v": 2,
            "kind": "eval",
            "dataset": {"origin": "\x1b[2J<script>", "planned": 3},
            "settings": {"num_samples": "<b>\x1b"},
            "metrics": {"<i>": {"loss": {"value": "x", "low": [], "high": None}}},
            "wins": 3,
            "tasks": [1],
        }
    )
    assert "\x1b" not in "".join(describe_evaluation(record)) and list(rows(record))[0][2] == "nan"


def fails(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["eval", *arguments])
    assert result.exit_code == 2, result.output
    message = result.stderr.strip()
    assert message.count("\n") == 0 and "Traceback" not in message, message
    return message


def test_wrong_options_fail_with_one_sentence(made: FinishedRun, reward_run: Path, tmp_path: Path) -> None:
    run = str(made.run)
    assert "no such run or model" in fails("./nowhere")
    assert "neither a run" in fails(str(tmp_path))
    assert "--pass-at-k 4 needs as many answers" in fails(run, "--pass-at-k", "4", "--num-samples", "2")
    assert "greedy answers are all the same" in fails(run, "--num-samples", "3", "--temperature", "0")
    assert "--bits is for models that are not runs" in fails(run, "--bits", "16")
    assert "--bits 8: it must be 4 or 16" in fails("tiny-tutor", "--bits", "8", "--dataset", "builtin:arithmetic")
    assert "give --dataset FILE" in fails("tiny-tutor")
    assert "no such file" in fails(run, "--dataset", "nothing.jsonl")
    assert "--dataset-config and --split" in fails(run, "--split", "test")
    assert "`anser` is not a reward; did you mean `answer`?" in fails(
        run, "--dataset", "builtin:arithmetic", "--verifier", "anser"
    )
    assert "`repetition` is a shaping" in fails(run, "--dataset", "builtin:arithmetic", "--verifier", "repetition")
    assert "only `algorithm: reward` trains" in fails(run, "--reward-model", run)
    assert "there is no such run" in fails(run, "--reward-model", "nowhere")
    assert "they must be the same" in fails(
        "tiny-tutor", "--dataset", "builtin:arithmetic", "--reward-model", str(reward_run)
    )
    assert "--tasks-path and --limit belong to --tasks" in fails(run, "--limit", "3")
    assert "trained a reward model, which does not answer" in fails(str(reward_run))
    assert "there is no such folder" in fails(run, "--out", str(tmp_path / "no" / "x.jsonl"))


def test_a_base_with_other_tensors_is_refused(made: FinishedRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(made.run, run)
    facts = json.loads((run / "base.json").read_text())
    first = next(iter(facts["tensors"]))
    (run / "base.json").write_text(json.dumps({**facts, "tensors": {**facts["tensors"], first: "0"}}))
    with pytest.raises(UserError, match="another base than"):
        evaluate(str(run), SHORT, quiet, CPU)


def test_wins_over_all_pairs_by_hand() -> None:
    def marks(*scores: float | None) -> list[GradedAnswer]:
        return [GradedAnswer("", 1, True, score=score) for score in scores]

    tuned, base = {0: marks(1, 3), 1: marks(None, 0)}, {0: marks(2, 1), 1: marks(0, 5)}
    found = win_rates(
        EvalResult(["base", "t"], [], {"t": tuned, "base": base}, {}, [0, 1]), "t", lambda mark: mark.score
    )
    pairs = [[(a > b, a == b) for a, b in product(mine, theirs)] for mine, theirs in (((1, 3), (2, 1)), ((0,), (0, 5)))]
    rates = [sum(win + tie / 2 for win, tie in several) / len(several) for several in pairs]
    assert found is not None and found["value"] == pytest.approx(sum(rates) / 2) == pytest.approx(
        (2.5 / 4 + 0.5 / 2) / 2
    )
    assert (found["wins"], found["ties"], found["losses"]) == pytest.approx((0.25, 0.375, 0.375))
