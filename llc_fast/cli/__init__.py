"""The command line, ``llc-fast``.

Each module of this folder holds one command, or a few that share their code, and lists them in ``COMMANDS``.
:mod:`llc_fast.cli.app` finds the modules by itself, so a new command is one new file. A module imports torch, and what
imports torch, inside its functions: ``llc-fast --help`` imports every module of this folder.
"""
