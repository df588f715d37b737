"""A BERT-style masked language model over words.

The model and its data are pykernels/testing/models/bert.py, which `pykernels train bert` trains too.
"""

from __future__ import annotations

from _common import main
from pykernels.testing.models.bert import task

if __name__ == "__main__":
    main(task)
