"""Step times of a large model on one accelerator: the four numbers of the fake engine's config.

The model is of the 8B class in bfloat16: 8.0e9 parameters, 32 layers, 8 KV heads of 128. The accelerator is a 40 GB
card of 312 TFLOP/s (dense bfloat16) and 1.56 TB/s, of which a step gets half of the one and 80 % of the other.

- Every step reads the weights once: 16.1 GB / 1.24 TB/s = 13 ms.
- A prompt token costs 2 FLOP per parameter: 16.1 GFLOP / 156 TFLOP/s = 0.10 ms. That hides behind the weights only in
  chunks of fewer than 130 tokens, which are rare, so it is added.
- A decoding request's compute does hide behind the weights, up to 130 of them; sampling and input preparation are left:
  0.02 ms.
- A token of context is read once in each layer: 2 x 32 x 8 x 128 x 2 bytes = 131 kB / 1.24 TB/s = 0.1 us.

What the weights leave of 90 % of the card's memory, 20 GB, holds 152,000 tokens of KV: 9,500 blocks of 16. Between
nodes KV moves at 20 GB/s: 6.6 us a token.
"""

from __future__ import annotations

from kvrelay.config.cluster_config import FakeEngineConfig

COSTS = FakeEngineConfig(step_s=13e-3, prefill_token_s=0.10e-3, decode_token_s=0.02e-3, context_token_s=0.1e-6)

BLOCK_SIZE = 16
NUM_BLOCKS = 9_500
TRANSFER_TOKEN_S = 6.6e-6
