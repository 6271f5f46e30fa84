"""`python -m deploynorm.cli`."""

import sys

from deploynorm.cli import main

sys.exit(main())
