"""Tiny random models of each architecture of llama.cpp, and what has to hold of routers on them.

models.py     builds generate.cpp and writes the files
routers.py    puts random routers on a file, and takes layers out of it
memory.py     such models for the tests of the K/V memory
checks.py     runs the files on both libraries, in processes of their own
"""
