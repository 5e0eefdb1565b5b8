"""One command per claim: `python -m realjax.bench.<name>` ends with one JSON object."""
