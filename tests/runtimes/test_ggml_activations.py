"""Rounding of activations against the kernels of ggml's CPU backend."""

import ggml_library
import numpy as np
import pytest
import torch

from pipeline.errors import UnsupportedError, UsageError
from runtimes.ggml_activations import (
    AFFINE_TYPES,
    activation_rounding,
    quantized_matmul,
    round_q8_0,
    round_q8_1,
    round_q8_k,
)
from runtimes.ggml_types import DECODERS, dequantize, offsets

WIDTH, ROWS, INPUTS = 1024, 12, 24
RNG = np.random.default_rng(0)


def inputs() -> np.ndarray:
    """Rows of very different size, with outliers, zeros, and groups that are all zero."""
    x = RNG.standard_normal((INPUTS, WIDTH)).astype(np.float32)
    x *= np.float32(10.0) ** RNG.uniform(-4, 3, (INPUTS, 1)).astype(np.float32)
    x[:, ::97] *= 30
    x[0] = 0
    x[1, :256] = 0
    x[2, ::2] = 0
    return x


def test_q8_0_and_q8_1_bytes() -> None:
    x = inputs()
    blocks = ggml_library.round_activations(x, "Q8_0").reshape(-1, 34)
    theirs = blocks[:, :2].copy().view(np.float16).astype(np.float32) * blocks[:, 2:].view(np.int8)
    np.testing.assert_array_equal(round_q8_0(torch.from_numpy(x)).numpy(), theirs.reshape(x.shape))
    blocks = ggml_library.round_activations(x, "Q8_1").reshape(-1, 36)
    scale, total = blocks[:, :4].copy().view(np.float16).astype(np.float32).T
    rounded, sums = round_q8_1(torch.from_numpy(x))
    theirs = scale[:, None] * blocks[:, 4:].view(np.int8)
    np.testing.assert_array_equal(rounded.numpy(), theirs.reshape(x.shape))
    np.testing.assert_array_equal(sums.numpy().ravel(), total)


def test_q8_k_bytes() -> None:
    x = inputs()
    blocks = ggml_library.round_activations(x, "Q8_K").reshape(-1, 292)
    scale = blocks[:, :4].copy().view(np.float32)
    theirs = (scale * blocks[:, 4:260].view(np.int8)).reshape(x.shape)
    np.testing.assert_array_equal(round_q8_k(torch.from_numpy(x)).numpy(), theirs)


@pytest.mark.parametrize(
    "type_name",
    [
        *("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q1_0", "Q2_0", "IQ4_NL"),
        *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
        *("IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS"),
    ],
)
def test_products_are_those_of_vec_dot(type_name: str) -> None:
    """Rows of weights with a mean, so that offsets and their rounding matter."""
    x = inputs()
    weights = (RNG.standard_normal((ROWS, WIDTH)) + 0.5).astype(np.float32)
    raw = ggml_library.quantize(weights, type_name)
    dense = torch.from_numpy(ggml_library.to_float(raw, type_name, WIDTH))
    shifts = None
    if type_name in AFFINE_TYPES:  # d and m are the first fields of both types
        blocks = raw.reshape(ROWS, WIDTH // 32, -1)
        shifts = torch.from_numpy(blocks[:, :, 2:4].copy().view(np.float16)[..., 0].astype("f4"))
    ours = quantized_matmul(torch.from_numpy(x), dense, type_name, shifts).numpy()
    theirs = ggml_library.matmul(x, raw, type_name)
    size = np.abs(x) @ np.abs(dense.numpy()).T + 1e-30  # what rounding noise is relative to
    assert (np.abs(ours - theirs) / size).max() < 3e-7
    plain = torch.nn.functional.linear(torch.from_numpy(x), dense).numpy()
    assert (np.abs(plain - theirs) / size).max() > (1e-6 if "F16" in type_name else 1e-5)


def test_rounding_of_a_plain_matrix_product_would_not_do_for_affine_types() -> None:
    """The separate rounding of the sums is visible: what `offsets` is for."""
    x = torch.from_numpy(inputs())
    raw = ggml_library.quantize((RNG.standard_normal((ROWS, WIDTH)) + 3).astype("f4"), "Q4_1")
    dense, shifts = dequantize(raw, "Q4_1", WIDTH), offsets(raw, "Q4_1", WIDTH)
    theirs = torch.from_numpy(ggml_library.matmul(x.numpy(), raw, "Q4_1"))
    naive = torch.nn.functional.linear(activation_rounding("Q4_1")(x), dense)
    ours = quantized_matmul(x, dense, "Q4_1", shifts)
    assert (ours - theirs).norm() < 0.02 * (naive - theirs).norm()


@pytest.mark.parametrize("type_name", DECODERS)
def test_shapes_and_purity(type_name: str) -> None:
    x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    shifts = torch.zeros(5, 8) if type_name in AFFINE_TYPES else None
    assert quantized_matmul(x, torch.ones(5, 256), type_name, shifts).shape == (2, 3, 5)
    assert torch.equal(activation_rounding(type_name)(x[0]), activation_rounding(type_name)(x)[0])
    assert torch.equal(x, before)


def test_wrong_use_is_named() -> None:
    x, weight = torch.ones(2, 96), torch.ones(5, 96)
    with pytest.raises(UnsupportedError, match="unknown ggml type Q9_9"):
        quantized_matmul(x, weight, "Q9_9")
    with pytest.raises(UnsupportedError, match="blocks of 256"):
        quantized_matmul(x, weight, "Q6_K")
    with pytest.raises(UsageError, match=r"Q4_1 needs offsets \[5, 3\], got none"):
        quantized_matmul(x, weight, "Q4_1")
    with pytest.raises(UsageError, match=r"got \[5, 2\]"):
        quantized_matmul(x, weight, "Q4_1", torch.zeros(5, 2))
