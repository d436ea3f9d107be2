"""The command `firstlight`: one file for each command."""
