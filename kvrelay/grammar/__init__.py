"""Grammars: what the output of a request may be, as masks of tokens.

The router compiles a grammar once to refuse what is invalid; the engine compiles it again and computes a mask for each
token it samples. The only package that imports llguidance (docs/adr/0019).
"""
