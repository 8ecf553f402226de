"""`python -m redisgate` is `redisgate`."""

import sys

from redisgate.cli import main

if __name__ == "__main__":
    sys.exit(main())
