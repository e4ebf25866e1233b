"""`--mode=compile`: compiles a config's steps for hardware that need not be present."""
