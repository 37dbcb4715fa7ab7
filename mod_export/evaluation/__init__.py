"""Quality against the dense model. The only package in which torch and llama.cpp meet."""
