"""A GPT: a causal Transformer decoder over characters.

The model and its data are pykernels/testing/models/gpt.py, which `pykernels train gpt` trains too.
"""

from __future__ import annotations

from _common import main
from pykernels.testing.models.gpt import task

if __name__ == "__main__":
    main(task)
