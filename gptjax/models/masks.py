# SPDX-License-Identifier: Apache-2.0
"""Which keys a query may see: forms of attention as values, which every kernel reads.

To add one: a class, and a line in FORMS. What the class says by seen() alone, of arrays of numpy
and of jax, is enough for the plain form, both kernels of CPUs, the ring, and splash attention; a
kernel that cannot do it steps aside. A form that sees ahead trains and scores windows; it does not
decode. Names are written in the config as NAME or NAME:option=value,... with the class's fields.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from gptjax.configs import errors, spec
from gptjax.scaling import flops

_ROWS = 1024  # of a grid of positions that are looked at at once


@dataclasses.dataclass(frozen=True)
class Mask:
    """A form of attention; positions are counted from 0, and every query sees itself."""

    @property
    def window(self) -> int:
        """How many positions back a query may look, its own included; 0 = any number."""
        return 0

    @property
    def fills_window(self) -> bool:
        """Whether it sees all there is in its window: a form that fused kernels know by name."""
        return False

    def seen(self, query: Any, key: Any) -> Any:
        """Whether queries see keys, from arrays of their positions that broadcast."""
        raise NotImplementedError

    def span(self, start: int, end: int, length: int) -> tuple[int, int]:
        """The first key, and the end of the keys, that queries start .. end - 1 may see."""
        seen = self.seen(np.arange(start, end)[:, None], np.arange(length)[None])
        found = np.flatnonzero(seen.any(axis=0))
        return int(found[0]), int(found[-1]) + 1

    def mean_seen(self, n_ctx: int) -> float:
        """Positions that a token of a full window sees on average, its own included."""
        return sum(int(seen.sum()) for _, _, seen in _grid(self, n_ctx)) / n_ctx

    def splash(self, length: int) -> Any:
        """The same as a mask of JAX's splash attention."""
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

        places = np.arange(length)
        return masks.NumpyMask(self.seen(places[:, None], places[None]))


@dataclasses.dataclass(frozen=True)
class Dense(Mask):
    """All positions up to its own."""

    fills_window = True

    def seen(self, query: Any, key: Any) -> Any:
        return query >= key

    def span(self, start: int, end: int, length: int) -> tuple[int, int]:
        return 0, end

    def mean_seen(self, n_ctx: int) -> float:
        return flops.mean_seen(n_ctx, 0)

    def splash(self, length: int) -> Any:
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

        return masks.CausalMask((length, length))


@dataclasses.dataclass(frozen=True)
class Banded(Mask):
    """The last `width` positions, its own included (GPT-3, section 2.1, "locally banded")."""

    width: int

    fills_window = True

    def __post_init__(self) -> None:
        errors.require_positive(self, 'width')

    @property
    def window(self) -> int:
        return self.width

    def seen(self, query: Any, key: Any) -> Any:
        return (query >= key) & (query - key < self.width)

    def span(self, start: int, end: int, length: int) -> tuple[int, int]:
        return max(0, start - self.width + 1), end

    def mean_seen(self, n_ctx: int) -> float:
        return flops.mean_seen(n_ctx, self.width)

    def splash(self, length: int) -> Any:
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

        return masks.LocalMask((length, length), window_size=(self.width - 1, 0), offset=0)


@functools.cache
def sees_ahead(mask: Mask, length: int) -> bool:
    """Whether a query of a window of this length sees a later position.

    Then what a token's layers say changes with what comes behind it: no cache can keep it.
    """
    return not mask.fills_window and any(
        (seen & (keys > rows)).any() for rows, keys, seen in _grid(mask, length)
    )


FORMS: dict[str, type[Mask]] = {'dense': Dense, 'banded': Banded}


def named(written: str, band_width: int) -> Mask:
    """The form of attention that a config names.

    Args:
      written: as 'dense', or 'banded:width=256'.
      band_width: of 'banded' where it says none itself.

    Raises:
      UsageError: there is no such form, or an option is unknown, missing or of another type.
    """
    name, _, text = written.partition(':')
    errors.require(name in FORMS, f'no form of attention {name!r}; there are: {", ".join(FORMS)}')
    form = FORMS[name]
    return spec.build(form, text, name, **({'width': band_width} if form is Banded else {}))


def _grid(mask: Mask, length: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(queries, keys, which of them are seen) of a window, some queries at a time."""
    keys = np.arange(length)[None]
    for start in range(0, length, _ROWS):
        rows = np.arange(start, min(start + _ROWS, length))[:, None]
        yield rows, keys, np.broadcast_to(mask.seen(rows, keys), (len(rows), length))
