"""What the writer and the reader agree on: names of files and tensors, and sizes of groups."""

from __future__ import annotations

MODEL, DATA = "model.onnx", "model.onnx_data"
"""The graph and its weights. Optimum fetches the second by the name of the first and ``_data``."""

GENAI_CONFIG = "genai_config.json"
"""What onnxruntime-genai reads first."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

QUANTIZED, SCALE, ZERO = "_quantized", "_scale", "_zero_point"
"""Ends of the names of a quantized weight's parts, as ONNX Runtime's own quantizer has them."""

LOW, HIGH = "_quantized_low", "_quantized_high"
"""Likewise of the two planes of packed 3-bit codes."""

PROVENANCE = "piso."
"""What the keys of our metadata start with."""

TYPES = f"{PROVENANCE}tensor_types"
"""Metadata key: JSON object of tensor names and the names of their formats, F16 or F32."""

GROUPS = {2: (32, 64, 128), 4: (16, 32, 64, 128, 256), 8: (16, 32, 64, 128, 256)}
"""Group sizes by width that ONNX Runtime fuses into a fast kernel.

It leaves smaller ones and those in between unfused, computes zeros or noise with 512 in releases
before 1.30 (issue 28551), and takes 30 times as long for 2 bits in groups of 16 or 256.
"""
