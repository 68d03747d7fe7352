"""The reference: transformers' own modules in float32, one decoder block in memory at a time."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UnsupportedError

ReadTensor = Callable[[str], Tensor]
"""Returns a tensor by its Hugging Face name, float32."""

_MODULES = {
    "llama": ("transformers.models.llama.modeling_llama", "Llama"),
    "qwen2": ("transformers.models.qwen2.modeling_qwen2", "Qwen2"),
    "qwen3": ("transformers.models.qwen3.modeling_qwen3", "Qwen3"),
}


class DecoderBlock:
    """One decoder block that can be run site by site.

    A site is a set of linears that share an input: qkv, o, gate_up, down. Between two sites only
    the residual stream and, before ``o``, the heads' outputs are kept; the rest is recomputed.

    Args:
        layer: A decoder layer of transformers with real weights.
        rotary: Its rotary embedding module.
        inner: What the graph does to the input of ``down_proj``; None is nothing.
    """

    def __init__(
        self, layer: nn.Module, rotary: nn.Module, inner: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.layer: Any = layer
        self._rotary = rotary
        self._inner = inner

    def linear(self, name: str) -> nn.Linear:
        """The linear called `name` relative to the block, such as ``self_attn.q_proj``."""
        module = self.layer.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise TypeError(f"{name} is not a linear")
        return module

    def replace(self, name: str, module: nn.Module) -> None:
        """Put another module in the place of the linear called `name`."""
        parent, _, leaf = name.rpartition(".")
        setattr(self.layer.get_submodule(parent), leaf, module)

    def site_input(self, site: str, residual: Tensor, heads: Tensor | None = None) -> Tensor:
        """Input of a site's linears, [batch, length, in].

        Args:
            site: ``qkv``, ``o``, ``gate_up`` or ``down``.
            residual: Residual stream before attention (qkv) or after it (gate_up, down).
            heads: Output of `heads`, for site ``o``.
        """
        layer = self.layer
        if site == "qkv":
            return layer.input_layernorm(residual)
        if site == "o":
            if heads is None:
                raise ValueError("site 'o' needs the heads' outputs")
            return heads
        normed = layer.post_attention_layernorm(residual)
        if site == "gate_up":
            return normed
        mlp = layer.mlp
        gated = mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)
        return gated if self._inner is None else self._inner(gated)

    def heads(self, residual: Tensor) -> Tensor:
        """Concatenated heads' outputs, the input of o_proj, [batch, length, heads * head_dim]."""
        attention = self.layer.self_attn
        projection = attention.o_proj
        attention.o_proj = nn.Identity()
        try:
            positions = torch.arange(residual.shape[1], device=residual.device)[None]
            return attention(
                hidden_states=self.layer.input_layernorm(residual),
                position_embeddings=self._rotary(residual, positions),
                attention_mask=None,
            )[0]
        finally:
            attention.o_proj = projection

    def add_attention(self, residual: Tensor, heads: Tensor) -> Tensor:
        """Residual stream after attention."""
        return residual + self.layer.self_attn.o_proj(heads)

    def add_mlp(self, residual: Tensor, inner: Tensor | None = None) -> Tensor:
        """Residual stream after the MLP.

        Args:
            residual: Residual stream before it.
            inner: Input of the site down, if it is known.
        """
        if inner is None:
            inner = self.site_input("down", residual)
        return residual + self.layer.mlp.down_proj(inner)

    def __call__(self, residual: Tensor) -> Tensor:
        return self.add_mlp(self.add_attention(residual, self.heads(residual)))


class TorchReference:
    """Streams token windows through a model whose weights come from a callback.

    Args:
        config: The transformers configuration.
        read: Returns the weights; called once per tensor and pass.
        head: Name of the output matrix (the embedding's, if tied).
        linears: Replaces the linear of that Hugging Face name: gets its module, returns another.
        batch: Windows that run together.
        device: Where the model runs; tokens and weights are expected and moved there.
        inner: Rotation at run time of the inputs of every ``down_proj``; None is none.

    Raises:
        UnsupportedError: No reference modules for the configuration's model type.
    """

    name = "torch"

    def __init__(
        self,
        config: Any,
        read: ReadTensor,
        *,
        head: str = "lm_head.weight",
        linears: Mapping[str, Callable[[nn.Linear], nn.Module]] | None = None,
        batch: int = 8,
        device: torch.device | str = "cpu",
        inner: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if config.model_type not in _MODULES:
            raise UnsupportedError(
                f"no PyTorch reference for architecture {config.model_type!r}",
                fix=f"known: {', '.join(_MODULES)}",
            )
        path, prefix = _MODULES[config.model_type]
        module = importlib.import_module(path)
        self._layer_class = getattr(module, f"{prefix}DecoderLayer")
        self._norm_class = getattr(module, f"{prefix}RMSNorm")
        self.config = config
        self.config._attn_implementation = "sdpa"
        self._rotary = getattr(module, f"{prefix}RotaryEmbedding")(config=config).to(device)
        self._read = lambda name: read(name).to(device)
        self._head = head
        self._linears = dict(linears or {})
        self._batch = batch
        self._inner = inner

    @property
    def n_blocks(self) -> int:
        """Number of decoder blocks."""
        return int(self.config.num_hidden_layers)

    @property
    def rotary(self) -> tuple[list[float], float]:
        """Frequencies of the rotary embedding, one a pair, and the factor of cosines and sines."""
        return self._rotary.inv_freq.tolist(), float(self._rotary.attention_scaling)

    def embed(self, tokens: Tensor) -> Tensor:
        """Residual stream at the input of the first block, float32 [n, length, hidden]."""
        return nn.functional.embedding(tokens, self._read("model.embed_tokens.weight"))

    def block(self, index: int) -> DecoderBlock:
        """Block `index` with its weights read."""
        with torch.device("meta"):
            layer = self._layer_class(self.config, layer_idx=index)
        prefix = f"model.layers.{index}."
        weights = {name: self._read(prefix + name) for name in layer.state_dict()}
        layer.load_state_dict(weights, assign=True)
        layer.eval().requires_grad_(False)
        block = DecoderBlock(layer, self._rotary, self._inner)
        for name, wrap in self._linears.items():
            if name.startswith(prefix):
                relative = name.removeprefix(prefix).removesuffix(".weight")
                block.replace(relative, wrap(block.linear(relative)))
        return block

    def head_input(self, residual: Tensor) -> Tensor:
        """Output of the final norm, the input of the output matrix."""
        return self.final_norm()(residual)

    def final_norm(self) -> nn.Module:
        """The final norm as a module."""
        norm = self._norm_class(self.config.hidden_size, eps=self.config.rms_norm_eps)
        norm.weight = nn.Parameter(self._read("model.norm.weight"), requires_grad=False)
        return norm

    def head(self) -> nn.Module:
        """The output matrix as a module."""
        weight = self._read(self._head)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        wrap = self._linears.get(self._head)
        return wrap(linear) if wrap else linear

    @torch.inference_mode()
    def logits(self, tokens: Tensor, first: int = 0) -> Iterator[Tensor]:
        """Logits at positions ``first .. length-2`` of every window, in order.

        Args:
            tokens: int64 [n, length].
            first: First position whose next-token prediction is wanted.

        Yields:
            float32 [length - 1 - first, vocabulary] per window.
        """
        states = list(self.embed(tokens).split(self._batch))
        for index in range(self.n_blocks):
            block = self.block(index)
            states = [block(state) for state in states]
        head = self.head()
        for state in states:
            for window in self.head_input(state[:, first:-1]):
                yield head(window)

    def close(self) -> None:
        """Nothing is held open."""

    def __enter__(self) -> TorchReference:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
