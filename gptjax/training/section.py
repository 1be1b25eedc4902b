# SPDX-License-Identifier: Apache-2.0
"""The train section of the config: how long, on what loss, and what is logged."""

import dataclasses
from typing import Literal

from gptjax.configs import errors
from gptjax.runtime import profiler


@dataclasses.dataclass(frozen=True)
class Config:
    """The train section of the config."""

    objective: str
    z_loss: float
    dropout_bits: Literal['threefry', 'rbg']
    total_tokens: int
    total_epochs: float
    log_every_steps: int
    eval_every_steps: int
    eval_max_tokens: int
    on_spike: Literal['stop', 'skip', 'rollback']
    spike_sigmas: float
    rollback_steps: int
    layer_norms: bool
    noise_scale: bool
    profile_at_step: int
    profile_steps: int
    profile_hosts: profiler.Hosts
    deterministic: bool
    end_if_hung: bool
    wandb_project: str

    def __post_init__(self) -> None:
        errors.require_between(
            self, 0, 2**60, 'total_tokens', 'total_epochs', 'eval_every_steps', 'eval_max_tokens'
        )
        errors.require_between(self, 0, 2**60, 'profile_at_step')
        errors.require_positive(self, 'log_every_steps', 'rollback_steps', 'profile_steps')
        errors.require_choice(self, 'on_spike', ('stop', 'skip', 'rollback'))
        errors.require_choice(self, 'profile_hosts', ('first', 'all'))
        errors.require_choice(self, 'dropout_bits', ('threefry', 'rbg'))
        errors.require_between(self, 0.0, 1e6, 'spike_sigmas', 'z_loss')
        errors.require(
            (self.total_tokens > 0) != (self.total_epochs > 0),
            'exactly one of train.total_tokens and train.total_epochs must be above 0, got '
            f'{self.total_tokens} and {self.total_epochs}',
        )
