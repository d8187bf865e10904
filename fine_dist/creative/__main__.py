"""`python -m fine_dist.creative`: learn a token for "creative"."""

import sys

from fine_dist.creative.command import main

if __name__ == "__main__":
    sys.exit(main())
