"""`python benchmarks/batch_size_study`."""

import sys

from study import main

# The processes of --jobs import `study` by its name, which they could not do with this file.
if __name__ == "__main__":
    sys.exit(main())
