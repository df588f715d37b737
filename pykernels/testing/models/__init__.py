"""Models of the language-model story and how each is trained: what `pykernels train` and `examples/` share."""

from __future__ import annotations

from collections.abc import Callable

from ..text import Text
from ..training import Task
from . import bert, dlrm, gpt, lstm_lm, prefix_lm, seq2seq

TASKS: dict[str, Callable[[Text, bool], Task]] = {
    "lstm-lm": lstm_lm.task,
    "gpt": gpt.task,
    "bert": bert.task,
    "prefix-lm": prefix_lm.task,
    "seq2seq": seq2seq.task_with_attention,
    "dlrm": dlrm.task,
}
"""Name -> (text, whether at toy size) -> the training."""
