"""``python -m kvtier``: the same as the ``kvtier`` command."""

from kvtier.cli import app

if __name__ == "__main__":
    app()
