import sys

from route_detr.cli import main

sys.exit(main())
