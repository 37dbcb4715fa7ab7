"""The studies behind the figures of docs/results: `python -m scripts.studies.NAME --help`."""
