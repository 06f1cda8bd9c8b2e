"""The residual stream of a model, from left to right: traced, followed, found, proven, named, and told as a map."""
