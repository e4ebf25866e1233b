"""`--mode=compile`: a config's steps compiled for hardware that need not be there."""
