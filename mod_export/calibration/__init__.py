"""Routers without training: what skipping costs, fitted in closed form."""
