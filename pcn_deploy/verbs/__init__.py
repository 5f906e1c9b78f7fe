"""One file per command, of its name: what the command line and `pcn_deploy.…` call."""
