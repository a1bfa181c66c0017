"""Moving K to other positions: rotary embeddings of p and of p + delta differ by a rotation by delta.

Rotary embedding (RoFormer, arXiv 2104.09864, section 3.2.2) rotates pair i of a key's elements by
``position * inv_freq[i]``. Rotations add up, so a key that was computed at position p and is rotated by
``delta * inv_freq`` is the key of position p + delta. Attention that looked at other positions has left
its traces in the layers' inputs all the same: a shifted block is an approximation of a recomputed one,
and the shift itself is exact up to the bound below.

Pairs: *neox* style joins elements ``i`` and ``i + rotary_dim / 2``, *gpt-j* style ``2 i`` and ``2 i + 1``.
With partial rotary, elements outside ``[first_dim, first_dim + rotary_dim)`` keep their bits. YaRN (arXiv
2309.00071) changes the frequencies, and multiplies what it rotates by a constant, which a cached key
already holds: a shift turns by YaRN's frequencies and multiplies by nothing.

Error bound against the exact rotation by ``delta * inv_freq`` of the stored key, with u = 2**-24:

    |y1' - y1| <= E + unit * (|y1| + E) + floor,    E = (|x1| + |x2|) * 2**-22

- ``y1 = x1 cos - x2 sin`` and ``y2 = x2 cos + x1 sin``. The tables are rounded from float64: each entry is
  off by at most 2**-25, since it is at most 1. Two products and a sum in float32 add at most
  2 u (|x1 cos| + |x2 sin|) (1 + u), fused or not. Together less than (|x1| + |x2|) * (2**-25 + 2**-23 + 2**-46).
- The result is rounded to the nearest value of the cache's dtype: ``unit`` is 2**-8, 2**-11 or 2**-24 for
  bfloat16, float16 and float32. ``floor`` is half of the dtype's smallest subnormal value, and 2**-147
  for float32, whose products may be subnormal.
- A result outside the dtype's range becomes infinite.

Behind an fp8 decode the rotation works on the decoded float32 values: add both elements' fp8 bounds, since
|cos| and |sin| are at most 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
FLOOR = {torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25, torch.float32: 2.0**-147}


@dataclass(frozen=True, eq=False)
class RotaryShift:
    """By how much to turn each pair.

    Args:
        cos, sin: float32 ``[rotary_dim / 2]`` on CPU, of ``delta * inv_freq``; without YaRN's factor.
        first_dim: the first element of a head that is rotated (MLA: behind the latent).
    """

    cos: Tensor
    sin: Tensor
    style: Literal["neox", "gptj"] = "neox"
    first_dim: int = 0

    def __post_init__(self) -> None:
        for table in (self.cos, self.sin):
            if table.dtype != torch.float32 or table.dim() != 1 or table.device.type != "cpu":
                raise ValueError(
                    f"a table of a rotary shift must be float32 [rotary_dim / 2] on CPU, not {table.dtype} "
                    f"{list(table.shape)} on {table.device}"
                )
        if len(self.cos) != len(self.sin) or not len(self.cos) or self.first_dim < 0:
            raise ValueError("a rotary shift needs as many cosines as sines, at least one, and first_dim >= 0")
        if self.style not in ("neox", "gptj"):
            raise ValueError(f"the rotary style is neox or gptj, not {self.style!r}")

    @property
    def rotary_dim(self) -> int:
        return 2 * len(self.cos)

    @classmethod
    def by(
        cls, delta: int, inv_freq: Tensor, style: Literal["neox", "gptj"] = "neox", first_dim: int = 0
    ) -> RotaryShift:
        """To ``delta`` positions later; ``inv_freq`` ``[rotary_dim / 2]``, YaRN's where the model uses it."""
        angles = delta * inv_freq.to(torch.float64).cpu()
        return cls(angles.cos().float(), angles.sin().float(), style, first_dim)

    @classmethod
    def from_cos_sin_cache(
        cls, cache: Tensor, delta: int, style: Literal["neox", "gptj"] = "neox", first_dim: int = 0
    ) -> RotaryShift:
        """From the table of vLLM's rotary embedding: ``[positions, rotary_dim]``, cosines before sines.

        YaRN's factor is divided out.

        Raises:
            ValueError: the table is no float32, or has no row for ``abs(delta)``.
        """
        if cache.dtype != torch.float32 or cache.dim() != 2:
            raise ValueError(
                f"the table must be float32 [positions, rotary_dim], not {cache.dtype} {list(cache.shape)}; "
                "RotaryShift.by computes one from inv_freq"
            )
        if abs(delta) >= len(cache):
            raise ValueError(f"the table has {len(cache)} positions, which is too few for a shift by {delta}")
        cos, sin = cache[abs(delta)].to(torch.float64).cpu().chunk(2)
        length = torch.hypot(cos, sin)
        return cls((cos / length).float(), (sin / length).float() * (1 if delta >= 0 else -1), style, first_dim)

    def check(self, head_size: int) -> None:
        """Raises ValueError where a head is too small for it."""
        if self.first_dim + self.rotary_dim > head_size:
            raise ValueError(
                f"a shift of the elements {self.first_dim} to {self.first_dim + self.rotary_dim - 1} does not fit "
                f"heads of {head_size}"
            )

    def pairs(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        """The first and the second elements of all pairs: views of ``heads`` ``[..., head_size]``."""
        rotated = heads[..., self.first_dim : self.first_dim + self.rotary_dim]
        return rotated.chunk(2, dim=-1) if self.style == "neox" else (rotated[..., 0::2], rotated[..., 1::2])


def error_bound(first: Tensor, second: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The bound above in float64, element by element; ``exact`` is the exact rotation's result."""
    computed = (first.to(torch.float64).abs() + second.to(torch.float64).abs()) * 2**-22
    return computed + UNIT[dtype] * (exact.abs() + computed) + FLOOR[dtype]
