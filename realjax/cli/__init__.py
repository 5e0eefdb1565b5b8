"""Commands: `python -m realjax.cli.<name>`."""
