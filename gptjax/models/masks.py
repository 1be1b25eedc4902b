# SPDX-License-Identifier: Apache-2.0
"""Which keys a query may see: forms of attention as values, which every kernel reads.

To add one: a class, and a line in FORMS. What the class says by seen() alone is enough for the
plain form, the tiles of CPUs, the ring, and splash attention; a kernel that cannot do it steps
aside. Names are written in the config as NAME or NAME:option=value,... with the class's fields.
"""

import dataclasses
from typing import Any

import numpy as np

from gptjax.configs import errors, spec
from gptjax.scaling import flops

_ROWS = 1024  # of a grid of positions that are looked at at once


@dataclasses.dataclass(frozen=True)
class Mask:
    """A form of attention; positions are counted from 0, and every query sees itself."""

    @property
    def causal(self) -> bool:
        """Whether no query sees a later position; the ring takes no other form."""
        return True

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
        keys, total = np.arange(n_ctx)[None], 0
        for start in range(0, n_ctx, _ROWS):
            rows = np.arange(start, min(start + _ROWS, n_ctx))[:, None]
            total += int(np.broadcast_to(self.seen(rows, keys), (len(rows), n_ctx)).sum())
        return total / n_ctx

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
    types = {field.name: field.type for field in dataclasses.fields(form)}
    found = spec.parse(text, types, f'attention {name!r}: option')
    if form is Banded:
        found = {'width': band_width} | found
    missing = [f'{key}=<{types[key].__name__}>' for key in types if key not in found]
    errors.require(not missing, f'attention {name!r} wants options: {name}:{",".join(missing)}')
    return form(**found)
