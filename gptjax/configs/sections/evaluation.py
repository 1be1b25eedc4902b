# SPDX-License-Identifier: Apache-2.0
"""How models are scored: on held-out text, and on the papers' tasks."""

from gptjax.configs.fields import free

EVALUATE = {
    'n_ctx': free(0, "tokens of a window; 0 = the model's"),
    'stride': free(0, "tokens between windows; 0 = the window's, that is without overlap"),
    'batch_windows': free(8, "windows scored at once; a multiple of the mesh's data x fsdp"),
    'max_tokens': free(0, 'whole documents up to so many tokens; 0 = the whole split'),
    'measures': free((), 'more numbers of held-out text: modules of gptjax.evals.held_out', was=()),
}
SUITE = {
    'tasks': free((), 'names of gptjax.evals.tasks; () = held-out text alone'),
    'k': free((0,), "examples in the prompt; -1 = the paper's few-shot K of each task"),
    'seeds': free((0,), 'of the draws of examples, each scored'),
    'limit': free(0, 'items of a task, drawn; 0 = all'),
    'n_ctx': free(0, "tokens of a prompt with its answer; 0 = the model's"),
    'stride': free(0, 'tokens between windows of whole texts; 0 = without overlap'),
    'batch_tokens': free(1024, 'scored at once; accelerators want more'),
    'batch_prompts': free(8, 'texts generated side by side'),
    'clean_against': free('', 'folder of a prepared corpus: also score the items not found in it'),
    'beside': free((), 'workdirs of other evaluations: compared, drawn in the pictures'),
    'keep_texts': free(
        False,
        "keep each item's prompt and answers in items/, beside what the model said",
        was=False,
    ),
    'download': free(False, 'let TFDS fetch what it has not prepared'),
}
