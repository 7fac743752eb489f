"""`python -m tileconv.bench` is `tileconv bench`; other commands follow as with `tileconv`."""

import sys

from .cli import app

if __name__ == "__main__":
    arguments = sys.argv[1:]
    # Options without a command belong to the main job.
    if not arguments or arguments[0].startswith("-"):
        arguments = ["bench", *arguments]
    app(arguments, prog_name="tileconv")
