"""Talking to a model: in a terminal and over HTTP."""
