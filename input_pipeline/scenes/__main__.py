"""Entry point of `python -m input_pipeline.scenes --output=DIR`, see `scene.main`."""

from input_pipeline.scenes.scene import main

main()
