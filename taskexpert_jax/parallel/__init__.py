"""One program on many devices and hosts."""
