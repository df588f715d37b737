"""A prefix language model: the prefix is read in both directions.

The model and its data are pykernels/testing/models/prefix_lm.py, which `pykernels train prefix-lm` trains too.
"""

from __future__ import annotations

from _common import main
from pykernels.testing.models.prefix_lm import task

if __name__ == "__main__":
    main(task)
