"""The base: what loads, what is refused and in which words, what the hash sees, and the CPU kernel that has no
gradient."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from models import (
    CPU,
    TOKENIZER,
    gradients,
    load_base_of,
    make_batch,
    perturb,
    ragged_batch,
    random_model,
    roles_over,
    same_bytes,
    saved_model,
    zero_grad,
)
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from lowrank_tune.config import BaseConfig
from lowrank_tune.errors import UserError
from lowrank_tune.model import base as base_module
from lowrank_tune.model.base import Base, base_hashes, combined_hash, freeze_base, load_base, load_tokenizer, nf4_config


def load_folder(folder: Path | str, bits: Any = 4, **more: Any) -> Base:
    return load_base(BaseConfig(model=str(folder), bits=bits, **more), TOKENIZER, CPU)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ragged_batch().input_ids).logits  # type: ignore[no-any-return]


# --- what loads -------------------------------------------------------------------------------------------------------


def test_sixteen_bits_are_the_model_itself() -> None:
    base = load_base_of(16)
    assert base.bits == 16 and torch.equal(logits(base.model), logits(random_model()))


def test_four_bits_are_nf4_with_double_quantization() -> None:
    base = load_base_of(4)
    linears = [m for m in base.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert base.bits == 4 and len(linears) == 14
    for linear in linears:
        state = linear.weight.quant_state
        assert state.quant_type == "nf4" and state.nested and linear.compute_dtype == torch.float32
    assert type(base.model.get_output_embeddings()) is nn.Linear


def test_the_base_is_frozen_and_in_train_mode() -> None:
    for bits in (4, 16):
        base = load_base_of(bits)
        assert not any(p.requires_grad for p in base.model.parameters())
        assert all(m.training for m in base.model.modules()) and base.model.config.use_cache is False
        assert base.end_ids == {1} and base.name == saved_model("llama", 0) and base.revision is None


def test_a_base_on_a_gpu_does_not_use_cudnn_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch prefers cuDNN's attention on some GPUs, and it builds a plan for each new shape: 72 ms for each decoding
    step on an H200."""
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        load_base_of(16)
        assert torch.backends.cuda.cudnn_sdp_enabled(), "a base on the CPU changes nothing"
        model = random_model()
        with FakeTensorMode():
            on_gpu = nn.Parameter(torch.empty(1, device="cuda:0"), requires_grad=False)
        monkeypatch.setattr(model, "parameters", lambda: iter([on_gpu]))
        freeze_base(model, TOKENIZER, name="llama", bits=16)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(allowed)


def test_folder_quantized_by_bitsandbytes_loads_unchanged(tmp_path: Path) -> None:
    """The weights are the same for any value of `bits`."""
    first = load_base_of(4)
    first.model.save_pretrained(tmp_path / "nf4")
    for bits in (4, 16):
        again = load_folder(tmp_path / "nf4", bits)
        assert again.bits == 4 and torch.equal(logits(again.model), logits(first.model))
        assert base_hashes(again.model) == base_hashes(first.model)
    roles = roles_over(again)
    roles.logps("policy", ragged_batch()).logps.sum().backward()
    assert gradients(roles).isfinite().all() and gradients(roles).any()


def test_folder_quantized_with_fp16_computes_in_the_dtype_of_the_run(tmp_path: Path) -> None:
    config = nf4_config(CPU)
    config.bnb_4bit_compute_dtype = torch.float16
    model = AutoModelForCausalLM.from_pretrained(
        saved_model(), quantization_config=config, dtype=torch.float16, device_map={"": CPU}
    )
    model.save_pretrained(tmp_path)
    base = load_folder(tmp_path)
    linears = [module for module in base.model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(linears) == 14
    for linear in linears:
        assert linear.compute_dtype == torch.float32 and linear.compute_type_is_set
    others = {name: weight for name, weight in base.model.named_parameters() if weight.dtype != torch.uint8}
    assert others and {weight.dtype for weight in others.values()} == {torch.float32}
    # Larger than fp16's largest number, 65,504.
    assert torch.isfinite(linears[0](torch.full((1, 2, 64), 1e5))).all()


def test_every_end_id_counts(tmp_path: Path) -> None:
    model = random_model()
    model.generation_config.eos_token_id = [4, 9]
    model.save_pretrained(tmp_path)
    assert load_folder(tmp_path).end_ids == {1, 4, 9}


def test_the_tiny_base_ships() -> None:
    wanted = BaseConfig()
    tokenizer = load_tokenizer(wanted)
    base = load_base(wanted, tokenizer, CPU)
    text = "Question: what is 7 + 5? \u00e9\u4e2d\U0001f600"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert (
        base.name == "tiny-tutor"
        and base.bits == 4
        and base.end_ids
        and sum(p.numel() for p in base.model.parameters()) < 4_000_000
    )
    assert len(tokenizer) <= base.model.get_input_embeddings().weight.shape[0]


# --- what is refused --------------------------------------------------------------------------------------------------


def sentence(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert text.startswith("base.model: ") and "\n" not in text and len(text) < 400, text
    return text


def copy_of(folder: Path, **config: Any) -> Path:
    shutil.copytree(saved_model("llama", 0), folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def test_missing_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "there is no folder" in sentence(lambda: load_folder(tmp_path / "none"))
    assert "there is no folder" in sentence(lambda: load_folder("./none"))
    assert "contains no config.json" in sentence(lambda: load_folder(tmp_path / "empty"))
    assert "contains no config.json" in sentence(lambda: load_tokenizer(BaseConfig(model=str(tmp_path / "empty"))))


def test_a_hub_model_without_network() -> None:
    for name in ("no-such-owner/no-such-model-4711", "no-such-owner/no-such-model-4711@v1", "nosuchmodel4711"):
        for call in (load_folder, lambda name: load_tokenizer(BaseConfig(model=name))):
            text = sentence(lambda call=call, name=name: call(name))
            assert name.partition("@")[0] in text and ("could not be fetched" in text or "revision" in text)
            if "could not be fetched" in text:
                assert "HF_HUB_OFFLINE is set, so nothing is fetched" in text and "hf download no" in text


OWN = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
PLANTED = (
    "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nPath({marker!r}).touch()\nOwnConfig = "
    "OwnModel = None\n"
)


def ran_own_code(folder: Path, trust: bool = False) -> bool:
    """Whether the Python file of a model folder was run while the model was asked for."""
    marker = folder / "ran-here"
    copy_of(folder, auto_map=OWN, model_type="own_and_unknown")
    (folder / "own.py").write_text(PLANTED.format(marker=str(marker)))
    wanted = BaseConfig(model=str(folder), trust_remote_code=trust)
    for call in (lambda: load_tokenizer(wanted), lambda: load_base(wanted, TOKENIZER, CPU)):
        try:
            text = sentence(call)
            assert trust or "brings Python code of its own" in text
        except AttributeError:
            pass  # the planted classes are none
    return marker.exists()


def test_code_of_a_model_is_not_run(tmp_path: Path) -> None:
    assert not ran_own_code(tmp_path / "model")


def test_code_of_a_model_that_runs_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    for module in ("dynamic_module_utils", "utils.hub"):
        monkeypatch.setattr(f"transformers.{module}.HF_MODULES_CACHE", str(tmp_path / "cache"), raising=False)
    assert ran_own_code(tmp_path / "trusted", trust=True)


def test_code_of_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    """A tokenizer can contain code although the model's configuration names none."""
    folder, marker = copy_of(tmp_path / "model"), tmp_path / "ran"
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    (folder / "own.py").write_text(PLANTED.format(marker=str(marker)))
    sentence(lambda: load_tokenizer(BaseConfig(model=str(folder))))
    assert not marker.exists()


class Evil:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.marker),)


def test_pickled_weights_are_refused_unread(tmp_path: Path) -> None:
    folder, marker = copy_of(tmp_path / "model"), tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Evil(str(marker))}, folder / "pytorch_model.bin")
    assert "no safetensors weights" in sentence(lambda: load_folder(folder))
    assert not marker.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert marker.exists(), "the trap must work, or this test is blind"


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folder = copy_of(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert "no safetensors weights" in sentence(lambda: load_folder(folder))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantized with gptq"),
        ({"quant_method": "awq", "bits": 4}, "quantized with awq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "quantized with bitsandbytes"),
        ({"quant_method": "fp8"}, "quantized with fp8"),
        ({"bits": 4}, ""),
    ],
)
def test_other_quantizations_are_refused(tmp_path: Path, method: dict[str, Any], message: str) -> None:
    folder = copy_of(tmp_path / "model", quantization_config=method)
    assert message in sentence(lambda: load_folder(folder))


@pytest.mark.parametrize(
    "spoil",
    [
        "weights cut",
        "weights empty",
        "weights garbage",
        "config garbage",
        "config list",
        "unknown type",
        "encoder",
        "config binary",
    ],
)
def test_broken_model_folder_raises_one_sentence(tmp_path: Path, spoil: str) -> None:
    folder = copy_of(tmp_path / "model")
    weights, config = folder / "model.safetensors", folder / "config.json"
    if spoil.startswith("weights"):
        data = weights.read_bytes()
        weights.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "garbage": b"\xff" * 100}[spoil.split()[1]])
    elif spoil == "config garbage":
        config.write_text("{")
    elif spoil == "config binary":
        config.write_bytes(b"\xff\xfe\x00{")
    elif spoil == "config list":
        config.write_text("[]")
    else:
        config.write_text(
            json.dumps(
                json.loads(config.read_text()) | {"model_type": "no_such_type" if spoil == "unknown type" else "vit"}
            )
        )
    sentence(lambda: load_folder(folder))


@pytest.mark.parametrize("spoil", ["missing tensor", "other shape"])
def test_weights_that_are_not_the_models(tmp_path: Path, spoil: str) -> None:
    """transformers would make up what is missing, at random, with a warning at most."""
    from safetensors.torch import load_file, save_file

    folder = copy_of(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors.pop(name) if spoil == "missing tensor" else tensors.update({name: tensors[name][:, :64].contiguous()})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for bits in (4, 16):
        assert "down_proj" in sentence(lambda bits=bits: load_folder(folder, bits))


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    folder = copy_of(tmp_path / "model")
    sentence(lambda: load_tokenizer(BaseConfig(model=str(folder))))


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_the_default_dtype_is_one_that_the_device_computes(
    has_bf16: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU older than compute capability 8.0 emulates bf16, which `is_bf16_supported` counts as support by default."""

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return has_bf16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert base_module.default_dtype(torch.device("cuda", 0)) == dtype
    assert base_module.default_dtype(CPU) == torch.float32


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_the_dtype_of_a_recipe_is_that_of_weights_products_and_autocast(name: Any) -> None:
    base_config = BaseConfig(dtype=name)
    base = load_base(base_config, load_tokenizer(base_config), CPU)
    dtype = getattr(torch, name)
    assert base.dtype == base.model.dtype == dtype
    for module in base.model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            assert module.compute_dtype == dtype
    with base.autocast():
        assert torch.is_autocast_enabled("cpu") == (dtype != torch.float32)
        assert dtype == torch.float32 or torch.get_autocast_dtype("cpu") == dtype


# --- the hash ---------------------------------------------------------------------------------------------------------


def flip(tensor: Tensor) -> None:
    """One bit of the last byte."""
    raw = tensor.data if tensor.ndim else tensor.data[None]
    raw.flatten().view(torch.uint8)[-1:].bitwise_xor_(1)


def parts_of(model: Any) -> dict[str, Tensor]:
    """One tensor of each kind that the base is made of."""
    weight = model.get_decoder().layers[1].mlp.down_proj.weight
    state = weight.quant_state
    return {
        "packed": weight,
        "absmax": state.absmax,
        "second absmax": state.state2.absmax,
        "offset": state.offset,
        "norm": model.get_decoder().norm.weight,
        "embedding": model.get_input_embeddings().weight,
        "head": model.get_output_embeddings().weight,
        "buffer": model.get_decoder().rotary_emb.inv_freq,
    }


def unseen_changes() -> list[str]:
    """Parts of the base whose change the hash does not see, or that it takes for another one's. Empty is right."""
    base = load_base_of(4)
    roles_over(base)
    unseen = []
    for part, tensor in parts_of_wrapped(base).items():
        before = base_hashes(base.model)
        flip(tensor)
        after = base_hashes(base.model)
        different = [name for name in before if before[name] != after[name]]
        if len(different) != 1 or before.keys() != after.keys() or combined_hash(before) == combined_hash(after):
            unseen.append(f"{part}: {different}")
        flip(tensor)
        if base_hashes(base.model) != before:
            unseen.append(f"{part}: not the same again")
    return unseen


def parts_of_wrapped(base: Base) -> dict[str, Tensor]:
    layer = base.model.get_decoder().layers[1].mlp.down_proj
    plain = type("Plain", (), {"weight": layer.base_layer.weight})
    base.model.get_decoder().layers[1].mlp._modules["down_proj"], kept = plain, layer  # type: ignore[assignment]
    try:
        return parts_of(base.model)
    finally:
        base.model.get_decoder().layers[1].mlp._modules["down_proj"] = kept


def test_the_hash_sees_every_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unseen_changes() == []
    real = base_module._stored_tensors
    monkeypatch.setattr(
        base_module, "_stored_tensors", lambda model: ((name, tensors[:1]) for name, tensors in real(model))
    )
    assert {text.split(":")[0] for text in unseen_changes()} == {"absmax", "second absmax", "offset"}


def test_two_loads_have_one_hash() -> None:
    first, second = base_hashes(load_base_of(4).model), base_hashes(load_base_of(4).model)
    assert first == second and combined_hash(first) == combined_hash(dict(reversed(second.items())))
    assert combined_hash(first) != combined_hash(base_hashes(load_base_of(16).model))


# --- the CPU kernel that has no gradient ------------------------------------------------------------------------------


def gradient_after_eval() -> float:
    """Norm of the adapters' gradient after an eval forward pass, which must not have touched the stored weights; NaN
    where there is none."""
    base = load_base_of(4)
    packed = [m.weight.data.clone() for m in base.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    roles = roles_over(base)
    perturb(roles, "policy")
    with roles.inference_mode():
        roles.logps("policy", make_batch([[5, 6, 7]]))
    now = [m.weight.data for m in base.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert all(same_bytes(a, b) for a, b in zip(packed, now, strict=True))
    zero_grad(roles)
    roles.logps("policy", ragged_batch()).logps.sum().backward()
    return float(gradients(roles).norm())


def test_an_eval_forward_leaves_the_gradient() -> None:
    assert gradient_after_eval() > 0


@pytest.mark.skipif(not bitsandbytes.functional.has_avx512bf16(), reason="only CPUs with AVX512-BF16 have the kernel")
def test_repacking_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the switch left as bitsandbytes sets it on such a CPU."""
    real = freeze_base

    def without_the_switch(model: Any, *args: Any, **more: Any) -> Base:
        base = real(model, *args, **more)
        for module in model.modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                module.support_avx512bf16_for_cpu = True
        return base

    monkeypatch.setattr(base_module, "freeze_base", without_the_switch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
            assert gradient_after_eval() > 0


def test_the_switch_exists_in_this_bitsandbytes() -> None:
    """A renamed attribute would be set in vain."""
    assert hasattr(bitsandbytes.nn.Linear4bit(8, 8), "support_avx512bf16_for_cpu")
    assert nf4_config(CPU).bnb_4bit_use_double_quant and nf4_config(CPU).bnb_4bit_quant_type == "nf4"


# Errors of transformers 5 for a gated repository, an absent one and an unknown revision, if the hub can be reached.
HUB_ERRORS = {
    "You are trying to access a gated repo.\nMake sure to have access to it at https://huggingface.co/a/b.\n401 "
    "Client Error.": "hf auth login",
    "a/b is not a local folder and is not a valid model identifier listed on "
    "'https://huggingface.co/models'": "check the name",
    "main2 is not a valid git identifier (branch name, tag name or commit id) that exists for this name. Check its "
    "revision": "no revision",
}


@pytest.mark.parametrize("error", HUB_ERRORS)
def test_an_error_of_the_hub_becomes_one_sentence(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(error)

    monkeypatch.setattr(PretrainedConfig, "get_config_dict", refuse)
    with pytest.raises(UserError, match=HUB_ERRORS[error]) as caught:
        load_tokenizer(BaseConfig(model="a/b@main2"))
    assert "\n" not in str(caught.value)
