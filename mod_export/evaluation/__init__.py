"""Quality against the dense model, in torch and on the runtime."""
