"""The built-in transforms, one module each. Copy one to write your own: a frozen config that, called with a residual
map and a context, yields edits and skips as data.
"""
