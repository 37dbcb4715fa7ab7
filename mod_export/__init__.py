"""Mixture-of-Depths for existing decoder models: convert, calibrate, export to GGUF, run on a
patched llama.cpp.

Importing this package imports nothing heavy; each module names what it needs.
"""

import logging

__version__ = "0.2.0"

# a library is silent by default; the command line shows the messages
logging.getLogger(__name__).addHandler(logging.NullHandler())
