"""python -m input_pipeline.scenes --output=DIR."""

from input_pipeline.scenes.scene import main

main()
