"""Entry point of `python -m input_pipeline.scenes --output=DIR`, see `scene.main`."""

import sys

from input_pipeline.scenes.scene import main

sys.exit(main())
