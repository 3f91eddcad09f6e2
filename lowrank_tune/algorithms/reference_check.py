"""Checks of the reference before the first step, and the KL to it."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_tune.algorithms.base import AlgorithmContext
from lowrank_tune.batch import Batch, LabeledBatch, PairBatch
from lowrank_tune.errors import TrainingError
from lowrank_tune.functional import masked_mean
from lowrank_tune.stats import Stats

LOGP_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.05}
"""Nats per token by which another batch shape may change log-probs, by the dtype of the base's weights (measured in
bf16: 0.016)."""

FAST_PATH_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Mean absolute difference of log-probs, in nats per token, that other kernels may cause (measured on an H200 in bf16:
0.04 to 0.06)."""


def full_vocab_kl_metric(
    context: AlgorithmContext,
    micro: Batch,
    temperature: float = 1.0,
) -> Stats:
    """Returns the metric `kl`: KL(policy || reference) per token over the whole vocabulary, without gradient."""
    kl = context.roles.full_vocab_kl(
        "policy",
        "reference",
        micro,
        temperature,
    )
    return {"kl": masked_mean(kl, micro.loss_mask)}


def check_reference(
    context: AlgorithmContext,
    micro: Batch,
    step: int,
) -> Tensor | None:
    """Compares the reference with the policy, if a fresh adapter is before its first step, and with cached log-probs,
    if the batch has them. Raises TrainingError if they differ.

    Returns log p - log ref (B, T) of a fresh policy as it is trained; None for another policy.
    """
    cached = micro.reference_sequence_logps if isinstance(micro, PairBatch | LabeledBatch) else None
    must_equal_policy = context.fresh and step == 0
    if not must_equal_policy and cached is None:
        return None
    roles = context.roles
    with roles.inference_mode(), roles.plain_paths():
        reference_logps = roles.logps("reference", micro).logps
    logratios = None
    if must_equal_policy:
        logratios = _check_policy(context, micro, reference_logps)
    if cached is not None:
        num_tokens = micro.loss_mask.sum(dim=1).clamp_min(1)
        differences = (reference_logps.sum(dim=1) - cached).abs() / num_tokens
        _check_cached_logps(context, float(differences.max()))
    return logratios


def _check_policy(
    context: AlgorithmContext,
    micro: Batch,
    reference_logps: Tensor,
) -> Tensor:
    """Compares the policy with the reference: without fast paths bit for bit, and as in training within the rounding
    of the dtype. Otherwise the loss of DPO would not begin at ln 2, and the KL not at 0. A difference of the fast paths
    disables them. Returns log p - log ref."""
    roles = context.roles
    with torch.no_grad(), roles.plain_paths():
        logps = roles.logps("policy", micro).logps
    if not torch.equal(logps, reference_logps):
        difference = float((logps - reference_logps).abs().max())
        raise TrainingError(
            "the reference is not what it must be: before the first step policy and reference "
            f"({context.reference_description}) differ by up to {difference:.1e} nats a token; nothing was trained"
        )
    # With autograd, as in training: a compiled layer has another graph without it.
    logratios = roles.logps("policy", micro).logps.detach() - reference_logps
    difference = float(logratios.abs().sum() / micro.loss_mask.sum().clamp_min(1))
    tolerance = fast_path_tolerance(context)
    if difference <= tolerance:  # False for nan
        return logratios
    roles.disable_fast_paths(
        f"before the first step the policy differs from its reference ({context.reference_description}) by "
        f"{difference:.1e} nats a token, more than {tolerance:g}"
    )
    return logps - reference_logps


def fast_path_tolerance(context: AlgorithmContext) -> float:
    """Returns the nats per token by which log-probs on the fast paths may differ from those on the plain ones."""
    return FAST_PATH_TOLERANCE[context.roles.base.model.dtype]


def logp_tolerance(context: AlgorithmContext) -> float:
    """Returns the nats per token by which another computation of the same log-probs may differ."""
    return LOGP_TOLERANCE[context.roles.base.model.dtype]


def _check_cached_logps(context: AlgorithmContext, difference: float) -> None:
    """`difference`: nats per token between cached and newly computed log-probs."""
    tolerance = logp_tolerance(context)
    if difference <= tolerance:  # False for nan
        return
    raise TrainingError(
        f"the cached log-probs of the reference ({context.reference_description}) are {difference:.1e} nats a token "
        f"from fresh ones, more than {tolerance:g}: delete the folder `reference` in the cache (`lowrank-tune doctor` "
        "names it) and start again"
    )
