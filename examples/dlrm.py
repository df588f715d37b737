"""A small DLRM on click-like data.

The model and its data are pykernels/testing/models/dlrm.py, which `pykernels train dlrm` trains too.
"""

from __future__ import annotations

from _common import main
from pykernels.testing.models.dlrm import task

if __name__ == "__main__":
    main(task)
