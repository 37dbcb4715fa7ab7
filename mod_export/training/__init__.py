"""Training of routers and weights, by distillation from the original model."""
