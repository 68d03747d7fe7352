"""Every change of every space leaves the function alone: transformers in float64 is the judge."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from pipeline.architectures.base import HEAD
from pipeline.architectures.spaces import KINDS, Space
from pipeline.transforms.changes import Change, changed, flatten, unflatten
from pipeline.transforms.operators import (
    BlockRotation,
    Fold,
    Operator,
    Permutation,
    Scaling,
    hadamard_rotation,
    orthogonal_rotation,
    random_orthogonal,
)
from tests.pipeline.transforms.models import SETTINGS, Judge

EXACT = 1e-9
GENERATOR = torch.Generator().manual_seed(5)


@cache
def judge(name: str) -> Judge:
    return Judge(name)


def difference(model: Judge, changes: list[Change]) -> float:
    """Largest difference of the logits, relative to their rms."""
    before = model.logits(model.weights)
    read = changed(model.read, changes)
    untied = not model.tied or any(HEAD in change.space.roles for change in changes)
    names = {*model.weights, HEAD} if untied else set(model.weights)
    after = model.logits({name: read(name) for name in names})
    return float((after - before).abs().max() / before.pow(2).mean().sqrt())


def matrix(operator: Operator) -> Tensor:
    """A of ``x' = A x``, as columns of what unit vectors become."""
    return operator.forward(torch.eye(operator.width, dtype=torch.float64)).T


def shuffled(space: Space) -> Permutation:
    if space.kind == "heads":
        groups = torch.randperm(space.width // space.share, generator=GENERATOR)
        inside = [torch.randperm(space.share, generator=GENERATOR) for _ in groups]
        rows = [g * space.share + order for g, order in zip(groups, inside, strict=True)]
        return Permutation(torch.cat(rows))
    units = range(0, space.width, space.unit)
    parts = [start + torch.randperm(space.unit, generator=GENERATOR) for start in units]
    return Permutation(torch.cat(parts))


def some_factors(space: Space) -> Scaling:
    factors = torch.exp(torch.randn(space.width, dtype=torch.float64, generator=GENERATOR))
    factors[::7] *= -100
    return Scaling(factors)


def operators(space: Space) -> list[Operator]:
    """One of each kind that the space allows."""
    found: list[Operator] = []
    if "order" in space.allows:
        found.append(shuffled(space))
    if "scale" in space.allows:
        found.append(some_factors(space))
    if "rotation" in space.allows:
        found.append(hadamard_rotation(space.width, space.unit, GENERATOR))
        found.append(orthogonal_rotation(space.width, space.unit, GENERATOR))
    return found


def folds(model: Judge, spaces: tuple[Space, ...]) -> list[Change]:
    kinds = ("attention_norm", "ffn_norm", "final_norm")
    return [
        Change(space, Fold(model.read(next(iter(space.roles))).clone()))
        for space in spaces
        if space.kind in kinds
    ]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_change_of_every_space_is_exact(name: str, kind: str) -> None:
    model = judge(name)
    spaces = [space for space in model.spaces() if space.kind == kind]
    assert bool(spaces) == (kind != "final_norm" or not model.tied)
    for space in spaces:
        for operator in operators(space):
            base = folds(model, model.spaces()) if operator.does == "rotation" else []
            assert difference(model, [*base, Change(space, operator)]) < EXACT, (space, operator)


@pytest.mark.parametrize("name", SETTINGS)
def test_compositions_are_exact(name: str) -> None:
    model = judge(name)
    spaces = model.spaces(tied=False)
    chain = [Change(s, shuffled(s)) for s in spaces if "order" in s.allows]
    chain += [Change(s, some_factors(s)) for s in spaces if s.kind in ("inner", "values")]
    read = changed(model.read, chain)
    chain += [Change(s, Fold(read(next(iter(s.roles))))) for s in spaces if s.kind.endswith("norm")]
    for space in spaces:
        if "rotation" in space.allows:
            chain.append(Change(space, hadamard_rotation(space.width, space.unit, GENERATOR)))
            chain.append(Change(space, orthogonal_rotation(space.width, space.unit, GENERATOR)))
    chain += [Change(s, some_factors(s)) for s in spaces if "scale" in s.allows]
    chain += [Change(s, shuffled(s)) for s in spaces if "order" in s.allows]
    assert difference(model, chain) < EXACT
    changed_names = {n for change in chain for n in change.space.roles}
    expected = {
        n for n in [*model.weights, HEAD] if not n.endswith(("q_norm.weight", "k_norm.weight"))
    }
    assert changed_names == expected


@pytest.mark.parametrize("kind", ["residual", "values", "inner", "heads", "ffn_norm"])
def test_a_change_of_one_side_only_is_noticed(kind: str) -> None:
    """The judge can see a difference: without the change of one tensor it is far from 0."""
    model = judge("qwen2")
    space = next(space for space in model.spaces() if space.kind == kind)
    change = Change(space, operators(space)[0])
    weights = {name: change.apply(name, model.read(name)) for name in model.weights}
    name = list(space.roles)[-1]
    weights[name] = model.read(name)
    before, after = model.logits(model.weights), model.logits(weights)
    assert float((after - before).abs().max()) > 1e-3


def test_a_gain_of_zero_folds() -> None:
    model = Judge("llama")
    model.weights["model.layers.1.input_layernorm.weight"][3] = 0
    chain = folds(model, model.spaces())
    assert difference(model, chain) < EXACT
    read = changed(model.read, chain)
    assert (read("model.layers.1.input_layernorm.weight") == 1).all()
    assert (read("model.layers.1.self_attn.q_proj.weight")[:, 3] == 0).all()


def test_what_a_space_does_not_allow_is_refused() -> None:
    model = judge("llama")
    spaces = {space.name: space for space in model.spaces()}
    tied = {space.name: space for space in judge("llama tied").spaces()}
    residual, values = spaces["residual"], spaces["block 0 values"]
    heads = spaces["block 0 heads"]
    swap_heads = torch.arange(heads.width)
    swap_heads[[0, heads.share]] = swap_heads[[heads.share, 0]]
    wide = torch.randperm(values.width, generator=GENERATOR)
    wrong: list[tuple[Space, Operator, str]] = [
        (residual, Scaling(torch.ones(residual.width).double()), "no change of scale"),
        (tied["residual"], hadamard_rotation(64, 64, GENERATOR), "no change of rotation"),
        (residual, Permutation(torch.arange(7)), "64 channels, not 7"),
        (values, Permutation(wide), "leave their head"),
        (values, hadamard_rotation(values.width, values.width, GENERATOR), "leave their head"),
        (heads, Permutation(swap_heads), "leave their head or group"),
        (spaces["block 0 inner"], hadamard_rotation(128, 128, GENERATOR), "no change of rotation"),
    ]
    for space, operator, part in wrong:
        with pytest.raises(ValueError, match=part):
            Change(space, operator)
    rotation = Change(residual, hadamard_rotation(64, 64, GENERATOR))
    name = "model.layers.0.input_layernorm.weight"
    with pytest.raises(ValueError, match="folded before"):
        rotation.apply(name, model.read(name))


@pytest.mark.parametrize("width", [64, 24, 36, 30])
def test_rotations_are_orthogonal_and_flat(width: int) -> None:
    A = matrix(hadamard_rotation(width, width, GENERATOR))
    torch.testing.assert_close(A @ A.T, torch.eye(width).double(), rtol=0, atol=1e-12)
    if width != 30:  # 15 has no Hadamard matrix: a random orthogonal one takes its place
        torch.testing.assert_close(A.abs(), torch.full_like(A, width**-0.5), rtol=0, atol=1e-12)
    B = matrix(hadamard_rotation(width, width // 2, GENERATOR))
    assert not B[: width // 2, width // 2 :].any()
    assert B[: width // 2, : width // 2].any(1).all()


def test_random_orthogonal_matrices_are_haars() -> None:
    """An entry of a Haar matrix of order n: E[x] = 0, E[x^2] = 1/n, E[x^4] = 3 / (n (n + 2))."""
    many = random_orthogonal(5, torch.Generator().manual_seed(0), 20_000)
    torch.testing.assert_close(
        many @ many.mT, torch.eye(5).double().expand_as(many), rtol=0, atol=1e-12
    )
    for power, moment in ((1, 0.0), (2, 1 / 5), (4, 3 / 35)):
        means = many.pow(power).mean(0)
        assert (means - moment).abs().max() < 0.02, power


def test_stored_changes_come_back() -> None:
    model = judge("qwen3")
    spaces = model.spaces()
    chain = [
        *folds(model, spaces),
        *(Change(s, operator) for s in spaces for operator in operators(s)),
    ]
    restored = unflatten(*flatten(chain), spaces)
    assert [c.space for c in restored] == [c.space for c in chain]
    for new, old in zip(restored, chain, strict=True):
        x = torch.randn(3, old.operator.width, dtype=torch.float64, generator=GENERATOR)
        assert type(new.operator) is type(old.operator)
        assert torch.equal(new.operator.forward(x), old.operator.forward(x))
        assert torch.equal(new.operator.dual(x), old.operator.dual(x))
    assert any(isinstance(c.operator, BlockRotation) for c in restored)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_seed_decides(seed: int) -> None:
    def made(seed: int) -> Tensor:
        return matrix(hadamard_rotation(32, 32, torch.Generator().manual_seed(seed)))

    assert torch.equal(made(seed), made(seed))
    assert not torch.equal(made(seed), made(seed + 1))
