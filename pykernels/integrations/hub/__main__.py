"""`python -m pykernels.integrations.hub FOLDER`."""

from __future__ import annotations

import sys

from . import export

if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
    sys.exit("usage: python -m pykernels.integrations.hub FOLDER")
print(export(sys.argv[1]))
