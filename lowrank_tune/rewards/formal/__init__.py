"""Rewards by formal tools: `smt` (Z3) and `lean`."""
