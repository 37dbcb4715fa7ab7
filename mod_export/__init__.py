"""Mixture-of-Depths for existing decoder models: convert, calibrate, export to GGUF, run on a
patched llama.cpp.

Importing this package imports nothing heavy; each module names what it needs.
"""

__version__ = "0.1.0"
