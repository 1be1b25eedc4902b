# SPDX-License-Identifier: Apache-2.0
"""How a run trains: batches, optimiser, length, checkpoints, devices."""

from gptjax.configs.fields import Section, fixed, free

UNITS = ('tokens', 'steps', 'epochs', 'episodes')
BATCH = {
    'batch_tokens': fixed(2048, 'tokens an update; a multiple of n_ctx'),
    'device_windows': free(
        0,
        'windows that a device takes at once, at most: a batch is cut into microbatches; 0 = all',
        was=0,
    ),
    'ramp_from_tokens': fixed(0, 'batch at the start of the ramp; 0 = no ramp'),
    'ramp_over_tokens': fixed(0, 'tokens until the full batch (GPT-3, section B)'),
    'ramp_stages': fixed(4, 'batch sizes the ramp goes through: each is one compilation'),
}


def optim(unit: str) -> Section:
    """The optim section, its durations in a unit of UNITS: the names of their fields end in it."""
    none = 0.0 if unit == 'epochs' else 0  # which may be fractions
    return {
        'optimizer': fixed(
            'adamw', 'a module of gptjax.training.optimizers; NAME:option=value,...', was='adamw'
        ),
        'peak_lr': fixed(1e-3, 'learning rate at the end of the warm-up'),
        'schedule': fixed(
            'cosine', 'from the end of the warm-up on: a function of training/schedules.py'
        ),
        f'warmup_{unit}': fixed(none, f'{unit} in which the rate rises, linearly from 0'),
        f'decay_{unit}': fixed(
            none, f'{unit} until the decay ends, warm-up included; 0 = all of training'
        ),
        f'cooldown_{unit}': fixed(
            none, f'{unit} of the decay of wsd, the last of decay_{unit}', was=none
        ),
        'final_lr_fraction': fixed(0.1, 'of peak_lr, at the end of the decay'),
        'b1': fixed(0.9, "decay of Adam's first moments, an update"),
        'b2': fixed(0.95, 'of its second moments'),
        'eps': fixed(1e-8, "outside the square root, as in Adam's paper, algorithm 1"),
        'weight_decay': fixed(0.1, 'decoupled (AdamW); biases and gains are spared'),
        'clip_norm': fixed(1.0, 'global gradient norm; 0 = no clipping'),
        'frozen': fixed(
            (), 'parameters that stay: patterns of paths, as network/*_embedding', was=()
        ),
        'mu_dtype': fixed('float32', "of Adam's first moments: float32 or bfloat16", was='float32'),
        'nu_dtype': fixed(
            'float32', 'of its second moments; bfloat16 wants b2 up to 0.99', was='float32'
        ),
        'reduce_dtype': fixed(
            'float32', 'in which gradients travel over mesh.data: or bfloat16', was='float32'
        ),
        'ema_decay': fixed(
            0.0, 'of an average of the weights, an update; 0 = none is kept', was=0.0
        ),
        'shard_moments': free(
            False, 'split the moments over mesh.data, too (ZeRO, stage 1)', was=False
        ),
        'offload': free(False, "keep the moments in the host's memory between steps", was=False),
    }


TRAIN = {
    'objective': fixed(
        'next_token',
        'a module of gptjax.training.objectives; NAME:option=value,...',
        was='next_token',
    ),
    'z_loss': fixed(
        0.0, 'times the mean of log^2 Z is added to the loss, Z the denominator of softmax', was=0.0
    ),
    'dropout_bits': fixed(
        'threefry', 'generator of what dropout draws; rbg is faster on TPUs', was='threefry'
    ),
    'total_tokens': fixed(200_000, 'length of the run; exactly one of these two is above 0'),
    'total_epochs': fixed(0.0, 'passes over all the training sets'),
    'log_every_steps': free(10, 'steps that a logged number is the mean of'),
    'eval_every_steps': free(200, 'steps from one evaluation to the next; 0 = only at the end'),
    'eval_max_tokens': free(
        10_000_000, 'of each held-out set, as evaluate.max_tokens; 0 = as that says', was=0
    ),
    'on_spike': free(
        'stop',
        'where the loss spikes or is not finite: stop; skip the update; or rollback: go back to '
        'a checkpoint and leave out the batches since',
    ),
    'spike_sigmas': free(0.0, 'deviations above the usual loss; 0 = only what is not finite'),
    'rollback_steps': free(100, 'steps that a rollback goes back at least'),
    'layer_norms': free(False, "log every layer's norms of weights, gradients, updates"),
    'noise_scale': free(
        False,
        'log the gradient noise scale, in tokens; batch.device_windows must cut the batch',
        was=False,
    ),
    'profile_at_step': free(0, 'write a profile from this step on; 0 = only on SIGUSR1'),
    'profile_steps': free(5, 'steps that it covers'),
    'profile_hosts': free('first', 'whose steps: of the first host, or of all', was='first'),
    'deterministic': free(
        False, 'on GPUs: nothing whose result depends on an order of chance; slower', was=False
    ),
    'end_if_hung': free(
        False, 'end where no step ends for 5 minutes and 10 times the usual', was=False
    ),
    'wandb_project': free('', "also log to Weights & Biases (pip install wandb); '' = no"),
}
CHECKPOINT = {
    'every_steps': free(500, 'steps from one to the next; 0 = only by time and at the end'),
    'every_secs': free(600.0, 'seconds from one to the next; 0 = only by steps and at the end'),
    'keep': free(2, 'newest ones kept; at least 2, so that a damaged one can be passed over'),
    'keep_steps': free((), 'steps that are saved and kept for ever', was=()),
    'keep_best': free(
        '', 'a score, as eval/tokens/bits_per_byte: the best checkpoint by it is kept, too', was=''
    ),
    'best_is': free('lowest', 'value of that score: lowest or highest', was='lowest'),
    'give_up_minutes': free(
        120.0, 'saves may fail so long before the run ends; 0 = for ever', was=0.0
    ),
}
MESH = {
    'data': free(-1, 'devices that share a batch; one axis may be -1: all devices that are left'),
    'fsdp': free(1, 'devices that share a batch and the parameters'),
    'tensor': free(1, 'devices that share heads, feed-forward nets and the vocabulary'),
    'context': free(1, 'devices that share the length of a window'),
    'slices': free(1, 'of TPUs, or hosts of GPUs; -1: what the devices say', was=1),
    'across': free('data', 'the axis that slices share: data or fsdp', was='data'),
}
