import sys

from tests.rehearsal.walk import main

sys.exit(main())
