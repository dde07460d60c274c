"""The `kelvin` command, one module a subcommand. Heavy imports happen inside the functions."""
