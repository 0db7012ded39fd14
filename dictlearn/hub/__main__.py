"""`python -m dictlearn.hub push FOLDER USER/REPO`: publish dictionaries."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dictlearn.hub.publish import push
from dictlearn.types import DictlearnError


def main(arguments: Sequence[str] | None = None) -> None:
    """Exit code 1 with one message where something cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m dictlearn.hub", description="Dictionaries on the Hub.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add = commands.add_parser("push", help="upload dictionaries in one commit, and compare one that comes back")
    add.add_argument("folder", metavar="FOLDER", help="of one dictionary, or of a run: all in it")
    add.add_argument("repo", metavar="USER/REPO", help="made where there is none")
    add.add_argument("--path", default="", help="folder in the repository; a run's dictionaries go to PATH/NAME")
    add.add_argument("--branch", help="default main; made where there is none")
    add.add_argument("--private", action="store_true", help="a new repository is private")
    add.add_argument("--dry-run", action="store_true", help="print what would be uploaded; no request is sent")
    given = parser.parse_args(arguments)
    try:
        pushed = push(**vars(given))
    except DictlearnError as error:
        sys.exit(str(error))
    if pushed.url is not None:
        sys.stdout.write("\n".join([pushed.url, *pushed.refs, ""]))


if __name__ == "__main__":
    main()
