"""Laws of the scalar head: what it reads, that it trains with its adapter, and that nothing of it is lost on the way to
PEFT and back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import (
    VOCAB,
    changed_tensors,
    load_base_of,
    make_batch,
    perturb,
    ragged_batch,
    reward_roles,
    roles_over,
    same_bytes,
    saved_model,
    unquantized_base,
    write_files,
    zero_grad,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from lowrank_tune.batch import Batch
from lowrank_tune.errors import UserError
from lowrank_tune.model.adapters import CONFIG, WEIGHTS, read_adapter
from lowrank_tune.model.heads import HEAD_WEIGHT_KEY, ScalarHead
from lowrank_tune.model.roles import Roles

ROWS = [[5, 9, 13, 2, 40, 41, 7], [8, 3, 96], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20], [33]]


# --- what it reads ----------------------------------------------------------------------------------------------------


def error_of_scores(roles: Roles, rows: Sequence[Sequence[int]], **how: Any) -> float:
    """Largest difference of `scores` and `sequence_scores` of padded rows to a head applied by hand to each row
    alone."""
    batch = make_batch(rows, **how)
    found, last = roles.scores("reward", batch), roles.sequence_scores("reward", batch)
    expected, ends = torch.zeros(found.shape), []
    for i, row in enumerate(rows):
        with roles.activate("reward"):
            hidden = roles.base.model.get_decoder()(
                input_ids=torch.tensor([list(row)]), use_cache=False
            ).last_hidden_state
        value = (hidden[0].double() @ roles.heads["reward"].weight[0].double()).float()
        expected[i, batch.attention_mask[i]] = value
        ends.append(value[-1])
    return max(float((found - expected).abs().max()), float((last - torch.stack(ends)).abs().max()))


PADDINGS: list[dict[str, Any]] = [{}, {"more": 9, "filler": 1}, {"left": True}, {"left": True, "more": 5, "filler": 7}]


@pytest.mark.parametrize("how", PADDINGS, ids=str)
@pytest.mark.parametrize("bits", [4, 16])
@torch.no_grad()
def test_score_is_the_head_at_the_token_for_any_padding(bits: int, how: dict[str, Any]) -> None:
    roles = reward_roles(load_base_of(bits), lower=["sft"])
    perturb(roles, "sft", "reward")
    assert error_of_scores(roles, ROWS, **how) < 2e-5


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    left=st.booleans(),
    ends=st.sampled_from([0, 1]),
    filler=st.sampled_from([0, 1, 50]),
)
@torch.no_grad()
def test_pad_and_end_tokens_inside_a_row_are_tokens(lengths: list[int], left: bool, ends: int, filler: int) -> None:
    """Rows that end in the padding token or in several end tokens: the last *attended* one counts."""
    rows = [
        torch.randint(2, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() + [ends] * (n % 3)
        for n in lengths
    ]
    assert error_of_scores(ROLES, rows, left=left, filler=filler) < 3e-5


ROLES = reward_roles(unquantized_base("llama"))
perturb(ROLES, "reward")


def _at_the_last_column(self: Roles, role: str, batch: Batch) -> Tensor:
    return self.heads[role](self.hidden(role, batch)[:, -1])  # type: ignore[no-any-return]


def _before_the_padding_token(self: Roles, role: str, batch: Batch) -> Tensor:
    last = ((batch.input_ids != 0).long() * torch.arange(batch.input_ids.shape[1])).argmax(dim=1)
    return self.heads[role](self.hidden(role, batch)[torch.arange(len(batch)), last])  # type: ignore[no-any-return]


@pytest.mark.parametrize("bug", [_at_the_last_column, _before_the_padding_token])
@torch.no_grad()
def test_score_at_the_wrong_token_is_found(monkeypatch: pytest.MonkeyPatch, bug: Any) -> None:
    monkeypatch.setattr(Roles, "sequence_scores", bug)
    # Whose padding has the state of the last token.
    monkeypatch.setattr(ROLES.decoder.packed_rows, "enabled", False)
    assert error_of_scores(ROLES, [[5, 6, 0, 0], [5, 6], [7]]) > 1e-2


def test_a_fresh_head_finds_everything_equal_and_only_the_role_trains() -> None:
    roles = reward_roles(load_base_of(), lower=["sft"], checkpointing=True)
    perturb(roles, "sft")
    batch = ragged_batch()
    scores = roles.sequence_scores("reward", batch)
    assert scores.dtype == torch.float32 and scores.shape == (len(batch),) and not scores.any()
    scores.sum().backward()  # type: ignore[no-untyped-call]
    names = list(roles.named_parameters("reward"))
    assert len(names) == 29 and names[-1] == "score.lt_reward.weight"
    assert roles.heads["reward"].weight.grad is not None and roles.heads["reward"].weight.grad.norm() > 1
    perturb(roles, "reward")
    zero_grad(roles)
    roles.sequence_scores("reward", batch).sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.any() for p in roles.parameters("reward"))
    assert all(p.grad is None for name, p in roles.base.model.named_parameters() if ".lt_reward." not in name)


def test_a_head_is_frozen_with_its_adapter() -> None:
    roles = roles_over(
        unquantized_base("llama"),
        extra=["reward"],
        stacks={"policy": ["policy"], "reward": ["reward"]},
        heads=["reward"],
    )
    perturb(roles, "policy", "reward")
    assert roles.parameters("reward") == [] and len(roles.parameters("policy")) == 28
    assert not roles.sequence_scores("reward", ragged_batch()).requires_grad
    with pytest.raises(AssertionError, match="the top adapter of its own role"):
        roles_over(unquantized_base("llama"), heads=["reference"])


def test_padding_of_any_value_leaves_the_gradient_alone() -> None:
    """A hidden state in the padding may be anything, infinite too; 0 times it would be NaN."""
    batch, roles = make_batch(ROWS), reward_roles(unquantized_base("llama"))
    perturb(roles, "reward")
    wild = torch.full((4, 10, 64), torch.inf)
    wild[batch.attention_mask] = 1.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roles, "hidden", lambda role, batch: wild.requires_grad_())
        (roles.scores("reward", batch).sum() + roles.sequence_scores("reward", batch).sum()).backward()  # type: ignore[no-untyped-call]
    assert torch.equal(roles.heads["reward"].weight.grad, torch.full((1, 64), 25.0))


def test_the_head_computes_in_fp32_under_autocast() -> None:
    head = ScalarHead(64, torch.device("cpu"))
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        inside = head(hidden)
    assert inside.dtype == torch.float32 and torch.equal(inside, head(hidden.float()))


# --- on disk and back -------------------------------------------------------------------------------------------------


def save(roles: Roles, folder: Path, name: str = "reward") -> Path:
    write_files(folder, {CONFIG: json.dumps(roles.adapter_config(name))})
    save_file(roles.adapter_tensors(name), folder / WEIGHTS)
    return folder


PLAIN = """
import sys, torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
rows, out, *places = sys.argv[1:]
given, scores = load_file(rows), {}
for base, adapter in zip(places[::2], places[1::2]):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        logits = model(input_ids=given["ids"], attention_mask=given["attended"]).logits
        scores[adapter] = logits.squeeze(-1).contiguous()
save_file(scores, out)
"""
OURS = """
import sys, torch
from safetensors.torch import load_file, save_file
from lowrank_tune import config
from lowrank_tune.model.adapters import read_adapter
from lowrank_tune.model.base import load_base
from lowrank_tune.model.roles import Roles
from lowrank_tune.batch import Batch
rows, out, *places = sys.argv[1:]
given, scores = load_file(rows), {}
for base, adapter in zip(places[::2], places[1::2]):
    for bits in (4, 16):
        saved = read_adapter(adapter, "adapters.reward.path", head=True)
        loaded = load_base(config.BaseConfig(model=base, bits=bits), None, torch.device("cpu"))
        roles = Roles(loaded, {"reward": saved.config}, ["reward"], {"reward": ["reward"]}, heads=["reward"])
        roles.load_adapter_tensors("reward", saved.tensors, "here")
        with roles.inference_mode():
            batch = Batch(given["ids"], given["attended"].bool(), given["attended"].bool())
            scores[f"{adapter}-{bits}"] = roles.sequence_scores("reward", batch)
save_file(scores, out)
"""


def in_a_new_process(code: str, rows: Path, *places: str) -> dict[str, Tensor]:
    out = rows.with_suffix(".out")
    done = subprocess.run(
        [sys.executable, "-c", code, str(rows), str(out), *places],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return load_file(out)


@pytest.mark.slow
def test_a_new_process_and_plain_peft_find_the_same_scores(tmp_path: Path) -> None:
    batch, expected, places = make_batch(ROWS), dict[str, Tensor](), list[str]()
    save_file({"ids": batch.input_ids, "attended": batch.attention_mask.long()}, tmp_path / "rows")
    for kind in ("llama", "qwen2"):
        folder = str(tmp_path / kind)
        places += [saved_model(kind), folder]
        for bits in (4, 16):
            roles = reward_roles(load_base_of(bits, kind))
            perturb(roles, "reward")
            save(roles, Path(folder))
            with roles.inference_mode():
                expected[f"{folder}-{bits}"] = roles.sequence_scores("reward", batch)
    plain, ours = (in_a_new_process(code, tmp_path / "rows", *places) for code in (PLAIN, OURS))
    assert all(float((plain[folder] - expected[f"{folder}-16"]).abs().max()) <= 1e-5 for folder in places[1::2])
    assert (
        changed_tensors(ours, expected) == set()
        and len(ours) == 4
        and all(scores.std() > 0.5 for scores in expected.values())
    )


def plain_peft_error(roles: Roles, folder: Path) -> float:
    """How far plain PEFT's scores are, in this process."""
    save(roles, folder)
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_pretrained(saved_model("llama"), num_labels=1, dtype=torch.float32)
    plain, batch = PeftModel.from_pretrained(model, str(folder)).eval(), make_batch(ROWS)
    with roles.inference_mode():
        theirs = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits.squeeze(-1)
        return float((theirs - roles.sequence_scores("reward", batch)).abs().max())


def test_head_that_is_not_saved_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roles = reward_roles(load_base_of(16))
    perturb(roles, "reward")
    assert plain_peft_error(roles, tmp_path / "whole") < 2e-5
    tensors = roles.adapter_tensors("reward")
    assert (
        len(tensors) == 29
        and tensors[HEAD_WEIGHT_KEY].shape == (1, 64)
        and tensors[HEAD_WEIGHT_KEY].dtype == torch.float32
    )
    monkeypatch.setattr(
        roles,
        "adapter_tensors",
        lambda name: {key: tensor for key, tensor in tensors.items() if key != HEAD_WEIGHT_KEY},
    )
    with pytest.raises(KeyError, match="score.weight"):  # PEFT notices, as `read_adapter` does
        plain_peft_error(roles, tmp_path / "lost")
    monkeypatch.setattr(roles, "adapter_tensors", lambda name: tensors | {HEAD_WEIGHT_KEY: torch.zeros(1, 64)})
    assert plain_peft_error(roles, tmp_path / "fresh") > 1e-2


def test_the_count_of_saved_tensors_sees_a_lost_head(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = reward_roles(unquantized_base("llama"))
    real = Roles._all_parameters
    monkeypatch.setattr(
        Roles,
        "_all_parameters",
        lambda self: iter([*real(self), ("score.lt_reward.other", self.heads["reward"].weight)]),
    )
    with pytest.raises(AssertionError, match="29 tensors to save, 30 in the model"):
        roles.adapter_tensors("reward")


def test_a_loaded_head_is_bit_equal_and_trains_on(tmp_path: Path) -> None:
    roles = reward_roles(load_base_of(), lower=["sft"])
    perturb(roles, "reward", "sft")
    saved = read_adapter(str(save(roles, tmp_path)), "adapters.reward.path", head=True)
    again = Roles(load_base_of(), {"reward": saved.config}, ["reward"], {"reward": ["reward"]}, heads=["reward"])
    again.load_adapter_tensors("reward", saved.tensors, "here")
    assert changed_tensors(again.adapter_tensors("reward"), roles.adapter_tensors("reward")) == set()
    assert saved.head is not None and same_bytes(again.heads["reward"].weight.detach(), saved.head)
    assert again.adapter_config("reward") == roles.adapter_config("reward")
    assert len(again.parameters("reward")) == 29
    again.heads["reward"].weight.data.zero_()
    assert saved.head.any()  # its own memory


def test_missing_or_wrong_head_is_refused_and_changes_no_weight() -> None:
    roles = reward_roles(unquantized_base("llama"))
    tensors = roles.adapter_tensors("reward")
    lost = {key: tensor for key, tensor in tensors.items() if key != HEAD_WEIGHT_KEY}
    for wrong in (
        tensors | {HEAD_WEIGHT_KEY: torch.ones(1, 32)},
        lost,
        tensors | {"base_model.model.more": torch.ones(1)},
    ):
        before = roles.adapter_tensors("reward")
        with pytest.raises(UserError, match="another base .* 1 tensors differ"):
            roles.load_adapter_tensors("reward", {key: tensor + 1 for key, tensor in wrong.items()}, "here")
        assert changed_tensors(before, roles.adapter_tensors("reward")) == set()


# --- a reward adapter is no policy ------------------------------------------------------------------------------------


def refused(folder: Path, head: bool) -> str:
    with pytest.raises(UserError) as caught:
        read_adapter(str(folder), "adapters.policy.path", head)
    text = str(caught.value)
    assert text.startswith("adapters.policy.path: ") and "\n" not in text and str(folder) in text
    return text


def test_a_reward_adapter_is_no_policy_and_a_policy_no_reward_adapter(tmp_path: Path) -> None:
    reward = save(reward_roles(unquantized_base("llama")), tmp_path / "reward")
    policy = save(roles_over(unquantized_base("llama")), tmp_path / "policy", "policy")
    assert refused(reward, False).endswith("reward is a reward adapter (it has a scalar head), not a policy")
    assert refused(policy, True).endswith("policy is a policy adapter (it has no scalar head), not a reward adapter")
    assert read_adapter(str(policy), "k").head is None
    config = read_adapter(str(reward), "k", head=True).config
    assert config.modules_to_save is None and str(config.task_type).endswith("CAUSAL_LM")


@pytest.mark.parametrize(
    ("modules", "head", "message"),
    [
        (["score"], None, "is broken: it should have a scalar head and has none"),
        (None, (1, 8), "is broken: it should have no head and has one of shape (1, 8)"),
        ([], (1, 8), "is broken: it should have no head and has one of shape (1, 8)"),
        (["score"], (2, 8), "is broken: it should have a scalar head and has one of shape (2, 8)"),
        (["score"], (8,), "is broken: it should have a scalar head and has one of shape (8,)"),
        (["classifier"], (1, 8), "uses modules_to_save ['classifier'], which"),
        (["score", "lm_head"], (1, 8), "uses modules_to_save ['score', 'lm_head'], which"),
        ("score", (1, 8), "uses modules_to_save score, which"),
        ([["score"]], (1, 8), "uses modules_to_save [['score']], which"),
    ],
)
@pytest.mark.parametrize("wanted", [False, True])
def test_broken_head_in_adapter_folder_raises_one_sentence(
    tmp_path: Path, modules: Any, head: tuple[int, ...] | None, message: str, wanted: bool
) -> None:
    raw = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "modules_to_save": modules}
    folder = write_files(tmp_path / "adapter", {CONFIG: json.dumps(raw)})
    save_file({"a": torch.zeros(1)} | ({} if head is None else {HEAD_WEIGHT_KEY: torch.zeros(head)}), folder / WEIGHTS)
    assert message in refused(folder, wanted)


def test_a_reward_adapter_that_peft_made_itself_is_read(tmp_path: Path) -> None:
    """PEFT's class for sequence classifiers adds `classifier` to the names by itself; only the `score` is there and
    saved."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(saved_model("llama"), num_labels=1, dtype=torch.float32)
    theirs = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="SEQ_CLS", init_lora_weights=False)
    ).eval()
    theirs.save_pretrained(str(tmp_path))
    assert "classifier" in json.loads((tmp_path / CONFIG).read_text())["modules_to_save"]
    saved = read_adapter(str(tmp_path), "adapters.reward.path", head=True)
    roles = Roles(load_base_of(16), {"reward": saved.config}, ["reward"], {"reward": ["reward"]}, heads=["reward"])
    roles.load_adapter_tensors("reward", saved.tensors, "here")
    batch = make_batch(ROWS)
    with roles.inference_mode():
        mine = roles.sequence_scores("reward", batch)
        expected = theirs(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits.squeeze(-1)
    assert float((mine - expected).abs().max()) <= 1e-5
