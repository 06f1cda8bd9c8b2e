"""The built-in transforms, one module each. Copy one to write your own: a frozen config that, called with the map of a
residual stream and a context, yields edits and skips as data.

Further families have their place here too, each in a module of its own: what re-parametrises weights (WeSaR), what
scales norms by depth (LayerNorm Scaling), what adds norms inside attention (QK-norm).
"""
