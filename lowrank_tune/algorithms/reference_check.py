"""The reference: what the policy is held to. It is never in doubt: it is asserted before the first step. Knows the
model floor alone."""

from __future__ import annotations

import torch

from lowrank_tune.batch import Batch
from lowrank_tune.errors import TrainingError
from lowrank_tune.model.roles import Roles

LOGP_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}
"""Nats a token by which another batch shape may change log-probs, by the dtype of the forward pass (measured: FIELD
notes, bf16 0.016)."""


def check_reference(roles: Roles, micro: Batch, expect_equal: bool, description: str) -> None:
    """Compares the reference with the cached log-probs in `micro`, and where `expect_equal`, with the policy, bit for
    bit, as the policy will run: then DPO's loss is ln 2 and KL is 0. Raises TrainingError where one is not what it must
    be."""
    with roles.inference_mode():
        reference = roles.logps("reference", micro).logps
    if expect_equal:
        with torch.no_grad():
            policy = roles.logps("policy", micro).logps
        if not torch.equal(policy, reference):
            raise TrainingError(
                f"the reference is not what it must be: before the first step policy and reference ({description}) "
                f"differ by up to {float((policy - reference).abs().max()):.1e} nats a token; nothing was trained"
            )
    if "reference" in micro.extra:
        difference = (reference.sum(dim=1) - micro.extra["reference"]).abs() / micro.loss_mask.sum(dim=1).clamp_min(1)
        tolerance = LOGP_TOLERANCE[torch.bfloat16 if roles.base.device.type == "cuda" else torch.float32]
        if not float(difference.max()) <= tolerance:  # nan is no agreement
            raise TrainingError(
                f"the cached log-probs of the reference ({description}) are {float(difference.max()):.1e} nats a token "
                f"from fresh ones, more than {tolerance:g}: delete the folder `reference` in the cache (`lowrank-tune "
                "doctor` names it) and start again"
            )
