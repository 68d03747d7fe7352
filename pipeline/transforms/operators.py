"""Changes of basis ``x' = A x`` that are cheap to store and to apply, in float64.

Every operator acts on the last dimension: `forward` is ``A x``, `dual` is ``A^-T x``. A matrix that
writes x gets ``forward`` of its columns, one that reads x gets ``dual`` of its rows, so that
``(W A^-1)(A x) = W x``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from pipeline.transforms.hadamard import elementary, hadamard_factors


class Operator(Protocol):
    """An invertible change of basis."""

    does: ClassVar[str]
    """``order``, ``scale`` or ``rotation``, as `architectures.spaces.Space.allows` has it."""

    @property
    def width(self) -> int:
        """Number of channels."""
        ...

    def forward(self, x: Tensor) -> Tensor:
        """``A x`` along the last dimension."""
        ...

    def dual(self, x: Tensor) -> Tensor:
        """``A^-T x`` along the last dimension."""
        ...

    def keeps(self, unit: int) -> bool:
        """Whether no channel leaves its run of `unit` neighbours."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What the operator is made of, for storing."""
        ...


@dataclass(frozen=True)
class Permutation:
    """Channels in another order.

    Attributes:
        order: Old index of each new channel, int64 [width].
    """

    order: Tensor
    does: ClassVar[str] = "order"

    @property
    def width(self) -> int:
        """Number of channels."""
        return len(self.order)

    def forward(self, x: Tensor) -> Tensor:
        """The channels in the new order."""
        return x[..., self.order]

    dual = forward

    def keeps(self, unit: int) -> bool:
        """Whether no channel leaves its run of `unit` neighbours."""
        return torch.equal(self.order // unit, torch.arange(self.width) // unit)

    def tensors(self) -> dict[str, Tensor]:
        """For storing."""
        return {"order": self.order}


@dataclass(frozen=True)
class Scaling:
    """Every channel times a factor.

    Attributes:
        factors: Not 0, float64 [width].
    """

    factors: Tensor
    does: ClassVar[str] = "scale"

    @property
    def width(self) -> int:
        """Number of channels."""
        return len(self.factors)

    def forward(self, x: Tensor) -> Tensor:
        """The channels times their factors."""
        return x * self.factors

    def dual(self, x: Tensor) -> Tensor:
        """The channels divided by their factors."""
        return x / self.factors

    def keeps(self, unit: int) -> bool:
        """Always: nothing moves."""
        return True

    def tensors(self) -> dict[str, Tensor]:
        """For storing."""
        return {"factors": self.factors}


@dataclass(frozen=True)
class Fold:
    """A norm's gain moved into the matrices that read from it; exact where a gain is 0 too.

    Attributes:
        gain: The norm's gain, float64 [width].
    """

    gain: Tensor
    does: ClassVar[str] = "scale"

    @property
    def width(self) -> int:
        """Number of channels."""
        return len(self.gain)

    def forward(self, x: Tensor) -> Tensor:
        """The new gain: ones."""
        return torch.ones_like(x)

    def dual(self, x: Tensor) -> Tensor:
        """A reading matrix's rows times the gain."""
        return x * self.gain

    def keeps(self, unit: int) -> bool:
        """Always: nothing moves."""
        return True

    def tensors(self) -> dict[str, Tensor]:
        """For storing."""
        return {"gain": self.gain}


@dataclass(frozen=True)
class Rotation:
    """Random signs, then a Kronecker product of small orthogonal matrices: ``(R1 x R2 x ...) S x``.

    Blocks are rotated alone where the first factor is an identity, which is stored by its order.

    Attributes:
        signs: 1 or -1, float64 [width].
        blocks: Order of the identity in front.
        factors: Orthogonal matrices, float64, whose orders times `blocks` are the width.
    """

    signs: Tensor
    blocks: int
    factors: tuple[Tensor, ...]
    does: ClassVar[str] = "rotation"

    @property
    def width(self) -> int:
        """Number of channels."""
        return len(self.signs)

    def forward(self, x: Tensor) -> Tensor:
        """Signs and then one small product after the other: ``width sum(orders)`` steps."""
        shape = (self.blocks, *(len(factor) for factor in self.factors))
        y = (x * self.signs).reshape(*x.shape[:-1], *shape)
        first = y.ndim - len(self.factors)
        for axis, factor in enumerate(self.factors, start=first):
            y = (y.movedim(axis, -1) @ factor.T).movedim(-1, axis)
        return y.reshape(x.shape)

    dual = forward

    def like(self, x: Tensor) -> Rotation:
        """The same in the precision of a tensor, where that is."""
        return Rotation(self.signs.to(x), self.blocks, tuple(f.to(x) for f in self.factors))

    def apply(self, x: Tensor) -> Tensor:
        """`forward` in the precision of x and where x is."""
        return self.like(x).forward(x)

    def keeps(self, unit: int) -> bool:
        """Whether blocks lie inside runs of `unit` channels."""
        return unit % (self.width // self.blocks) == 0

    def tensors(self) -> dict[str, Tensor]:
        """For storing."""
        found = {"signs": self.signs, "blocks": torch.tensor(self.blocks)}
        return found | {f"factor{n}": factor for n, factor in enumerate(self.factors)}


@dataclass(frozen=True)
class BlockRotation:
    """One orthogonal matrix of its own for each run of channels.

    Attributes:
        matrices: float64 [blocks, order, order].
    """

    matrices: Tensor
    does: ClassVar[str] = "rotation"

    @property
    def width(self) -> int:
        """Number of channels."""
        return self.matrices.shape[0] * self.matrices.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """Each run of channels times its matrix."""
        blocks, order, _ = self.matrices.shape
        if blocks == 1:
            return x @ self.matrices[0].T
        y = x.reshape(*x.shape[:-1], blocks, 1, order) @ self.matrices.mT
        return y.reshape(x.shape)

    dual = forward

    def keeps(self, unit: int) -> bool:
        """Whether blocks lie inside runs of `unit` channels."""
        return unit % self.matrices.shape[1] == 0

    def tensors(self) -> dict[str, Tensor]:
        """For storing."""
        return {"matrices": self.matrices}


def restore(name: str, tensors: Mapping[str, Tensor]) -> Operator:
    """An operator from its class name and `Operator.tensors`."""
    if name == "Rotation":
        factors = tuple(tensors[f"factor{n}"] for n in range(len(tensors) - 2))
        return Rotation(tensors["signs"], int(tensors["blocks"]), factors)
    known: dict[str, Callable[..., Operator]] = {
        "Permutation": Permutation,
        "Scaling": Scaling,
        "Fold": Fold,
        "BlockRotation": BlockRotation,
    }
    return known[name](**tensors)


def hadamard_rotation(
    width: int, block: int, generator: torch.Generator, *, signs: bool = True
) -> Rotation:
    """Randomized Hadamard rotation of every run of `block` channels.

    Where `hadamard_factors` leaves an odd factor, a random orthogonal matrix of that order takes
    its place in the product.

    Args:
        width: Number of channels, a multiple of `block`.
        block: Channels that are mixed.
        generator: Of signs and of that matrix.
        signs: Random signs; else all are 1.
    """
    orders, rest = hadamard_factors(block)
    factors = [torch.from_numpy(elementary(n)).double() / n**0.5 for n in orders]
    chosen = 2.0 * torch.randint(2, (width,), generator=generator).double() - 1
    if rest > 1:
        factors.append(random_orthogonal(rest, generator))
    return Rotation(chosen if signs else torch.ones(width).double(), width // block, tuple(factors))


def random_orthogonal(order: int, generator: torch.Generator, count: int = 1) -> Tensor:
    """Orthogonal matrices, uniform under Haar's measure: QR of Gaussians with the signs of R's
    diagonal (Mezzadri, arXiv math-ph/0609050), float64 [order, order] or [count, order, order]."""
    gaussian = torch.randn(count, order, order, dtype=torch.float64, generator=generator)
    Q, R = torch.linalg.qr(gaussian)
    signs = torch.sign(R.diagonal(dim1=-2, dim2=-1))[:, None, :]
    found = (Q * signs).contiguous()  # other strides, other bits in products
    return found[0] if count == 1 else found


def orthogonal_rotation(width: int, block: int, generator: torch.Generator) -> BlockRotation:
    """A random orthogonal matrix of its own for every run of `block` channels."""
    matrices = random_orthogonal(block, generator, width // block)
    return BlockRotation(matrices.reshape(-1, block, block))
