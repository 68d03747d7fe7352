"""Function-preserving rewrites of a model before it is quantized.

`TRANSFORMS` maps the name that a recipe uses to ``"module:function"``; the module is imported only
when the transform runs. No transform is registered yet.
"""

from __future__ import annotations

TRANSFORMS: dict[str, str] = {}
