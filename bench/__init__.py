"""Checks, inspections, measurements and the reports made from them; the command line is cli.py."""
