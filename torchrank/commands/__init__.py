"""One file per topic of the command line; torchrank/cli.py names them and loads each when it is called.

At module level these files import click and the standard library only, so that `torchrank --help` stays quick.
"""
