"""Codebooks: the vectors of magnitudes that ggml's IQ2 and IQ3 types can store (ggml-common.h).

Eight consecutive weights take their magnitudes from one vector of 8 (IQ2) or two vectors of 4
(IQ3), and a sign each. Some types store seven signs only: the eighth makes the number of negative
ones even. The vectors are those of the ``gguf`` package, the decoders of llama.cpp in Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import VerificationError

SIGNED_TOGETHER = 8
"""Consecutive weights whose signs are stored together."""


@dataclass(frozen=True)
class Codebook:
    """Which magnitudes may stand side by side.

    A code counts the format's levels from the smallest, as everywhere: with n magnitudes the codes
    ``n .. 2n - 1`` are the positive levels upwards and ``n - 1 .. 0`` the same ones negated.

    Attributes:
        name: ggml name of the type.
        even: The number of negative weights among eight is even.
    """

    name: str
    even: bool

    @property
    def places(self) -> int:
        """Weights of an entry: 8 or 4."""
        return self.entries.shape[1]

    @property
    def unit(self) -> int:
        """Consecutive weights that can be chosen without regard to all others."""
        return SIGNED_TOGETHER if self.even else self.places

    @cached_property
    def entries(self) -> Tensor:
        """Magnitudes of every entry as indices into `magnitudes`, int64 [entries, 8 or 4]."""
        return torch.from_numpy(np.searchsorted(self._magnitudes, self._grid))

    @cached_property
    def magnitudes(self) -> tuple[int, ...]:
        """What the entries are made of, ascending."""
        return tuple(int(value) for value in self._magnitudes)

    @cached_property
    def _grid(self) -> np.ndarray:
        import gguf  # the types know their grids; not needed for any other format

        kind = getattr(gguf.quants, self.name)
        kind.init_grid()
        grid: np.ndarray = np.array(kind.grid).reshape(kind.grid_shape)
        return grid

    @cached_property
    def _magnitudes(self) -> np.ndarray:
        return np.unique(self._grid)

    @cached_property
    def children(self) -> Tensor:
        """Prefix tree of the entries, int64 [nodes, magnitudes], node 0 its root.

        The node after one more magnitude; -1 where no entry goes on like that; 0 after the last
        place of an entry, where the next entry begins.
        """
        entries, places = self.entries, self.places
        rows: list[list[int]] = [[-1] * len(self.magnitudes)]
        for entry in entries.tolist():
            node = 0
            for place, magnitude in enumerate(entry):
                if place == places - 1:
                    rows[node][magnitude] = 0
                    break
                if rows[node][magnitude] < 0:
                    rows[node][magnitude] = len(rows)
                    rows.append([-1] * len(self.magnitudes))
                node = rows[node][magnitude]
        return torch.tensor(rows)

    @cached_property
    def _places(self) -> Tensor:
        """Entry of every combination of magnitudes, -1 for none, int64 [magnitudes ** places]."""
        found = torch.full((len(self.magnitudes) ** self.places,), -1)
        found[self._combined(self.entries)] = torch.arange(len(self.entries))
        return found

    def _combined(self, magnitudes: Tensor) -> Tensor:
        """Magnitudes [..., places] read as the digits of one number."""
        places = magnitudes.shape[-1]
        powers = len(self.magnitudes) ** torch.arange(places, device=magnitudes.device)
        return (magnitudes * powers).sum(-1)

    def split(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """What is stored for some codes.

        Args:
            codes: Integers [rows, in].

        Returns:
            Entries, int64 [rows, in / 8 or in / 4], and whether each weight is negative, bool
            [rows, in].

        Raises:
            VerificationError: The magnitudes are no entry of the codebook, or the number of
                negative weights is odd where it must be even (a bug in a solver).
        """
        wide, n = codes.long(), len(self.magnitudes)
        negative = wide < n
        magnitudes = torch.where(negative, n - 1 - wide, wide - n)
        vectors = magnitudes.reshape(len(wide), -1, self.places)
        entries = self._places.to(codes.device)[self._combined(vectors)]
        if (entries < 0).any():
            raise VerificationError(
                f"codes of {self.name} hold {vectors[entries < 0][0].tolist()}",
                why="the codebook has no such vector of magnitudes",
            )
        if self.even and (negative.reshape(-1, SIGNED_TOGETHER).sum(1) % 2).any():
            raise VerificationError(
                f"eight codes of {self.name} hold an odd number of negative weights",
                why="seven signs are stored, and the eighth makes their number even",
            )
        return entries, negative
