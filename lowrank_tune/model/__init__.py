"""The frozen base, the roles over it, and log-probs without logits."""
