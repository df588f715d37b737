"""Sequence to sequence with LSTMs, without and with attention.

The model and its data are pykernels/testing/models/seq2seq.py, which `pykernels train seq2seq` trains too.
"""

from __future__ import annotations

from _common import main
from pykernels.testing.models.seq2seq import task, task_with_attention

if __name__ == "__main__":
    main(task, task_with_attention)
