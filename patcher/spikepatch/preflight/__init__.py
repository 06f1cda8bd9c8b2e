"""Whether a model is at risk before it is trained: its traced graph, run on numbers, measured and judged."""
