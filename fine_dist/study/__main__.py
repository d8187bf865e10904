"""`python -m fine_dist.study`: run a table of methods."""

import sys

from fine_dist.study.command import main

if __name__ == "__main__":
    sys.exit(main())
