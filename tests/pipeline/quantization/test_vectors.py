"""Vectors of codebooks: every entry with every pattern of signs is enumerated, twins, layers."""

from __future__ import annotations

import itertools
from functools import cache

import gguf
import numpy as np
import pytest
import torch

from exporters.gguf import pack
from pipeline.errors import UnsupportedError
from pipeline.kernels import fit_vectors
from pipeline.kernels.twin import vectors as twin
from pipeline.kernels.vectors import _blocks, upper_root
from pipeline.quantization.formats import QuantizedTensor, get_format
from pipeline.quantization.layer import LayerOptions, quantize_free, quantize_layer
from pipeline.quantization.order import ColumnOrder
from pipeline.quantization.refine import refine
from pipeline.quantization.scales.base import BlockProblem
from pipeline.quantization.scales.hierarchical import hierarchical
from pipeline.quantization.scales.vectors import neighbours
from tests.pipeline.quantization.problems import correlated
from tests.pipeline.quantization.test_sequential import layer

NAMES = ["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"]
EVEN = {"IQ2_XXS", "IQ2_XS", "IQ3_XXS"}


@cache
def vectors(name: str) -> np.ndarray:
    """Every vector of 8 (IQ3: of 4, with all signs) in levels; from the gguf package alone."""
    kind = getattr(gguf.quants, name)
    kind.init_grid()
    grid = kind.grid.reshape(kind.grid_shape).astype(float)
    signs = np.array(list(itertools.product([1.0, -1.0], repeat=grid.shape[1])))
    if name in EVEN and grid.shape[1] == 8:
        signs = signs[signs.prod(1) > 0]
    unit = {"IQ2": 8, "IQ3": 4 if name == "IQ3_XXS" else 1}[name[:3]]
    return (grid[:, None] * signs).reshape(-1, grid.shape[1]) / unit


def group(name: str, seed: int, rows: int = 9, size: int | None = None):
    """Weights of one group and its metric; the last rows are zero and constant."""
    rng, size = np.random.default_rng(seed), size or get_format(name).group_size
    X = correlated(rng, size)
    w = rng.standard_t(4, (rows, size))
    w[-1], w[-2] = 0, 1
    return torch.tensor(w), torch.tensor(X.T @ X)


def every(w: torch.Tensor, scale: float) -> torch.Tensor:
    """The same scale as the only candidate of every row."""
    return torch.full((len(w), 1), scale, dtype=torch.float64)


def values(name: str, codes: torch.Tensor) -> np.ndarray:
    return np.array(get_format(name).levels)[codes.numpy()]


def least(name: str, x: np.ndarray, M: np.ndarray, scale: float) -> float:
    """Smallest (x - s q)' M (x - s q) over every vector."""
    V = x - scale * vectors(name)
    return float(np.einsum("ni,ij,nj->n", V, M, V).min())


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_S"])
def test_one_vector_is_the_best_of_all(name: str) -> None:
    w, M = group(name, 0, size=get_format(name).vector)
    for scale in (0.05, 0.3, 2.0):
        found = fit_vectors(w, M, every(w, scale), get_format(name), sweeps=0)
        for r, x in enumerate(w.numpy()):
            difference = x - scale * values(name, found.level_indices[r])
            reached = difference @ M.numpy() @ difference
            assert reached == pytest.approx(least(name, x, M.numpy(), scale), rel=1e-9, abs=1e-12)
            assert found.loss[r].item() == pytest.approx(reached, rel=1e-9, abs=1e-12)


def test_of_two_entries_under_one_parity_the_better_pair_is_taken() -> None:
    """IQ3_XXS: the best first entry of either parity, then the best second one that it allows."""
    name, fmt = "IQ3_XXS", get_format("IQ3_XXS")
    w, M = group(name, 1, size=8)
    found = fit_vectors(w, M, every(w, 0.25), fmt, sweeps=0)
    M, entries = M.numpy(), 0.25 * vectors(name)
    odd = (entries < 0).sum(1) % 2
    schur = M[:4, :4] - M[:4, 4:] @ np.linalg.solve(M[4:, 4:], M[4:, :4])
    for r, x in enumerate(w.numpy()):
        losses = []
        for parity in (0, 1):
            allowed = entries[odd == parity]
            d = x[:4] - allowed
            first = d[np.einsum("ni,ij,nj->n", d, schur, d).argmin()]
            both = np.concatenate([np.tile(first, (len(allowed), 1)), x[4:] - allowed], axis=1)
            losses.append(np.einsum("ni,ij,nj->n", both, M, both).min())
        assert found.loss[r].item() == pytest.approx(min(losses), rel=1e-9)
        codes = values(name, found.level_indices[r])
        assert (codes < 0).sum() % 2 == 0


@pytest.mark.parametrize("name", NAMES)
def test_no_vector_improves_the_result(name: str) -> None:
    """With the others held, every vector that could be stored in its place is enumerated."""
    fmt = get_format(name)
    w, M = group(name, 2, rows=5)
    scale = 0.2
    found = fit_vectors(w, M, every(w, scale), fmt, sweeps=100)
    M, places = M.numpy(), vectors(name).shape[1]
    for r, x in enumerate(w.numpy()):
        difference = x - scale * values(name, found.level_indices[r])
        reached = difference @ M @ difference
        assert found.loss[r].item() == pytest.approx(reached, rel=1e-9, abs=1e-9)
        for at in range(0, len(x), places):
            part = slice(at, at + places)
            pull = (difference @ M)[part]
            held = x[part] - difference[part]
            tries = scale * vectors(name)
            if name == "IQ3_XXS":
                tries = tries[(tries < 0).sum(1) % 2 == (held < 0).sum() % 2]
            step = tries - held
            own = M[part, part]
            change = np.einsum("ni,ij,nj->n", step, own, step) - 2 * step @ pull
            assert change.min() >= -1e-9 * reached - 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_the_best_candidate_is_taken_and_the_start_never_lost(name: str) -> None:
    fmt = get_format(name)
    w, M = group(name, 3)
    scales = torch.tensor([0.3, 0.1, 0.2, 0.0], dtype=torch.float64).expand(len(w), 4)
    together = fit_vectors(w, M, scales, fmt, sweeps=0)
    alone = [fit_vectors(w, M, scales[:, k : k + 1], fmt, sweeps=0) for k in range(4)]
    losses = torch.stack([one.loss for one in alone], dim=1)
    torch.testing.assert_close(together.loss, losses.min(1).values, rtol=1e-12, atol=0)
    assert torch.equal(together.chosen, losses.argmin(1))
    plain = torch.einsum("ri,ij,rj->r", w, M, w)
    torch.testing.assert_close(alone[3].loss, plain, rtol=1e-10, atol=0)
    identity = torch.eye(len(M)).double()
    start = scales[:, 0], fit_vectors(w, identity, scales[:, :1], fmt, sweeps=0)[1]
    before = w - 0.3 * fmt.grid[start[1]]
    lost = torch.einsum("ri,ij,rj->r", before, M, before)
    for sweeps in (0, 3):
        found = fit_vectors(w, M, scales, fmt, start=start, sweeps=sweeps)
        assert (found.loss <= lost * (1 + 1e-12)).all()
        kept = found.chosen == 4
        used = torch.where(kept, 0.3, scales.gather(1, found.chosen.clamp_max(3)[:, None])[:, 0])
        difference = w - used[:, None] * fmt.grid[found.level_indices]
        reached = torch.einsum("ri,ij,rj->r", difference, M, difference)
        torch.testing.assert_close(found.loss, reached, rtol=1e-9, atol=1e-12)
        if sweeps == 0:
            assert torch.equal(found.level_indices[kept], start[1][kept])
    only = fit_vectors(w, M, scales[:, :0], fmt, start=start, sweeps=3)
    assert (only.chosen == 0).all()
    assert (only.loss <= lost).all()


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_compiled_form_and_twin_agree(name: str, given: bool) -> None:
    fmt = get_format(name)
    w, M = group(name, 4, rows=12)
    scales = torch.tensor([0.3, 0.15, 0.0, 0.22], dtype=torch.float64).repeat(len(w), 1)
    near = fit_vectors(w, torch.eye(len(M)).double(), scales[:, :1], fmt, sweeps=0)
    start = (scales[:, 1].contiguous(), near.level_indices)
    found = fit_vectors(w, M, scales, fmt, start=start if given else None, sweeps=3)
    book = fmt.codebook
    halves = _blocks(M if name == "IQ3_XXS" else M[:0], book.places)
    expected = twin.fit_vectors(
        w,
        M,
        upper_root(M),
        (*_blocks(M, book.unit), *halves),
        scales,
        *start,
        given,
        twin.Book(book.children, fmt.grid, book.places, book.unit, book.even),
        3,
    )
    assert torch.equal(found.chosen, expected[0])
    assert torch.equal(found.level_indices, expected[1])
    torch.testing.assert_close(found.loss, expected[2], rtol=1e-10, atol=1e-12)


def test_formats_without_a_codebook_and_broken_groups_are_refused() -> None:
    w, M = group("IQ2_XS", 5)
    with pytest.raises(ValueError, match="Q4_K has no vectors"):
        fit_vectors(w, M, torch.ones(len(w), 1), get_format("Q4_K"), sweeps=0)
    with pytest.raises(ValueError, match="groups of 12"):
        fit_vectors(w[:, :12], M[:12, :12], torch.ones(len(w), 1), get_format("IQ2_XS"), sweeps=0)


@pytest.mark.parametrize("name", NAMES)
def test_sub_scales_around_another_stay_odd_and_in_range(name: str) -> None:
    found = neighbours(torch.tensor([1, 3, 17, 31]), get_format(name))
    assert (found % 2 == 1).all()
    assert found.min() == 1
    assert found.max() == 31
    assert found[2].tolist() == [17, 15, 19, 13, 21]


@pytest.mark.parametrize("name", NAMES)
def test_scales_of_a_super_group_are_near_those_of_its_groups(name: str) -> None:
    """The loss under the lattice is close to that of groups whose scale is free."""
    fmt = get_format(name)
    rng = np.random.default_rng(6)
    spread = np.exp(rng.uniform(-0.7, 0.7, (8, 256 // fmt.group_size)))
    w = rng.standard_normal((8, 256)) * spread.repeat(fmt.group_size, axis=1)
    w = torch.tensor(np.concatenate([w, np.zeros((1, 256))]))
    identity = torch.eye(256, dtype=torch.float64)
    scales = hierarchical(BlockProblem(w, identity), fmt)
    stored = QuantizedTensor(fmt, scales.level_indices.to(torch.int8), scales.fields)
    pack(stored)
    loss = (stored.dequantize() - w).square().sum(1)
    free = torch.zeros(9, dtype=torch.float64)
    for part in w.split(fmt.group_size, dim=1):
        tries = part.square().mean(1).sqrt()[:, None] * torch.linspace(0.1, 1.0, 150).double()
        if name == "IQ3_S":
            tries = tries / 3
        M = torch.eye(fmt.group_size, dtype=torch.float64)
        free += fit_vectors(part, M, tries, fmt, sweeps=0).loss
    assert (loss[:-1] < 1.06 * free[:-1]).all(), loss / free
    assert loss[-1] == 0
    assert (scales.fields["d"] >= 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shuffle", [False, True])
def test_orders_keep_vectors_whole(name: str, shuffle: bool) -> None:
    fmt = get_format(name)
    mass = torch.rand(768, generator=torch.Generator().manual_seed(0))
    order = (
        ColumnOrder.shuffled(mass, fmt, torch.Generator().manual_seed(1))
        if shuffle
        else ColumnOrder.by_activation(mass, fmt)
    )
    places = order.columns.reshape(-1, fmt.vector)
    assert torch.equal(places - places[:, :1], torch.arange(fmt.vector).expand(len(places), -1))
    assert (places[:, 0] % fmt.vector == 0).all()
    assert sorted(order.columns.tolist()) == list(range(768))
    in_groups = mass[places].sum(1).reshape(-1, fmt.group_size // fmt.vector)
    assert (in_groups.diff(dim=1) <= 0).all()
    assert torch.equal(order.columns[:: fmt.group_size] // fmt.group_size, order.groups)


def check_stored(W, objective, found) -> None:
    """What is returned can be stored, and its loss is that of the stored values."""
    pack(found.quantized)
    loss = objective.loss(found.quantized.dequantize(), W.double())
    torch.testing.assert_close(found.loss, loss, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_feedback_and_refinement_lower_the_loss_of_a_layer(name: str) -> None:
    W, objective = layer(4, rows=12, width=256, tokens=900)
    fmt, options = get_format(name), {"mismatch": 0}
    near = quantize_layer(W, objective, fmt, LayerOptions(rounding="nearest", **options))
    solved = quantize_layer(W, objective, fmt, LayerOptions(**options))
    refined = quantize_layer(W, objective, fmt, LayerOptions(refine_rounds=4, **options))
    for found in (near, solved, refined):
        check_stored(W, objective, found)
    assert solved.relative_loss < 0.5 * near.relative_loss
    assert refined.relative_loss < 0.95 * solved.relative_loss
    assert list(refined.refined) == sorted(refined.refined, reverse=True)


@pytest.mark.parametrize("name", ["IQ2_XS", "IQ3_XXS", "IQ3_S"])
def test_after_refinement_no_vector_improves_a_row(name: str) -> None:
    """The fixpoint of the descent over the whole row: all vectors at all places are enumerated."""
    W, objective = layer(5, rows=3, width=256, tokens=900)
    fmt = get_format(name)
    start = quantize_layer(W, objective, fmt, LayerOptions(mismatch=0)).quantized
    done = refine(start, objective.hessian, W.double(), rounds=60, tolerance=0)
    H, T = objective.hessian.numpy(), W.double().numpy()
    V = done.quantized.dequantize().double().numpy()
    scale = done.quantized.group_scales().double().numpy()
    places = vectors(name).shape[1]
    for r in range(3):
        pull = (T[r] - V[r]) @ H
        loss = (T[r] - V[r]) @ pull
        for at in range(0, 256, places):
            part = slice(at, at + places)
            tries = scale[r, at // fmt.group_size] * vectors(name)
            if name == "IQ3_XXS":
                tries = tries[(tries < 0).sum(1) % 2 == (V[r, part] < 0).sum() % 2]
            step = tries - V[r, part]
            change = np.einsum("ni,ij,nj->n", step, H[part, part], step) - 2 * step @ pull[part]
            assert change.min() >= -1e-6 * loss


@pytest.mark.parametrize(
    "options",
    [
        {"rounding": "groupwise", "passes": 2},
        {"scales": "absmax"},
        {"scales": "mse", "activation_order": False},
        {"scales": "proxy"},
        {"scales": "lookahead", "orders": 2},
        {"metric": "block"},
        {"hessian": "identity"},
        {"interleave": "layer"},
        {"interleave": "layer", "passes": 0, "rounding": "qronos"},
        {"rounding": "nearest", "scales": "absmax"},
        {"signed": False, "refine_rounds": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["IQ2_S", "IQ3_XXS"])
def test_every_other_way_gives_what_can_be_stored(name: str, options: dict) -> None:
    W, objective = layer(6, rows=5, width=512, tokens=900)
    found = quantize_layer(W, objective, get_format(name), LayerOptions(mismatch=0, **options))
    check_stored(W, objective, found)
    assert found.relative_loss < 0.5


@pytest.mark.parametrize("rounding", ["gptaq", "gpfq"])
def test_column_by_column_is_refused(rounding: str) -> None:
    W, objective = layer(6, rows=2, width=256, tokens=400)
    with pytest.raises(UnsupportedError, match=f"IQ2_S cannot be rounded by {rounding}"):
        quantize_layer(W, objective, get_format("IQ2_S"), LayerOptions(rounding=rounding))


@pytest.mark.parametrize("name", NAMES)
def test_data_free_error_is_that_of_the_c_library_or_less(name: str) -> None:
    ggml_oracle = pytest.importorskip("tests.exporters.gguf.ggml_oracle")
    from exporters.gguf import ggml_type

    W = torch.randn(24, 512, generator=torch.Generator().manual_seed(0))
    kind = ggml_type(name).type_id
    theirs = ggml_oracle.dequantize(kind, ggml_oracle.quantize(kind, W.numpy()), 512)
    ours = quantize_free(W, get_format(name), "piso")
    pack(ours)
    stock = np.square(theirs - W.numpy()).sum()
    assert (ours.dequantize() - W).square().sum() < stock
