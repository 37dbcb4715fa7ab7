"""RULER (arXiv 2404.06654): 13 tasks at long context, whose context is read before the question."""
