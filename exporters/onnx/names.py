"""Names of files and of tensors in them that the writer and the reader agree on."""

from __future__ import annotations

MODEL, DATA = "model.onnx", "model.onnx_data"
"""The graph and its weights. Optimum fetches the second by the name of the first and ``_data``."""

GENAI_CONFIG = "genai_config.json"
"""What onnxruntime-genai reads first."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

QUANTIZED, SCALE = "_quantized", "_scale"
"""Ends of the names of a quantized weight's parts, as ONNX Runtime's own quantizer has them."""

PROVENANCE = "piso."
"""What the keys of our metadata start with."""

TYPES = f"{PROVENANCE}tensor_types"
"""Metadata key: JSON object of tensor names and the names of their formats, F16 or F32."""
