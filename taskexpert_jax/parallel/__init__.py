"""One program on many devices and hosts, and the threads of each host."""
