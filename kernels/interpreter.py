"""Repairs of the Triton interpreter."""


def repair() -> None:
    """Not there yet."""
