import sys

from .lint import main

if __name__ == "__main__":
    sys.exit(main())
