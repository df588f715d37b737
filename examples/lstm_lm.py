"""An LSTM language model over characters.

The model and its data are pykernels/testing/models/lstm_lm.py, which `pykernels train lstm-lm` trains too.
"""

from __future__ import annotations

from _common import main
from pykernels.testing.models.lstm_lm import task

if __name__ == "__main__":
    main(task)
