"""The frozen base, the roles over it, and log-probs without logits."""

import logging

# Said at import, on CPUs whose fused kernel could be downloaded: this kit switches that kernel off (it has no gradient).
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
