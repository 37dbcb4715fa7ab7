"""Getting the patched llama.cpp: its source, its build, its wheel and its converter."""
