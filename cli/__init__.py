"""The command line `pcn-compile`: thin commands over the library's verbs."""
