"""`python -m deploynorm`."""

import sys

from deploynorm.cli import main

sys.exit(main())
