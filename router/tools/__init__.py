"""Finds tool calls and reasoning in a model's output: a file per format. Text in, parts out; no HTTP, no tokens.

``parts`` has what comes out, ``output_parser`` combines the parsers, ``formats`` chooses them.
"""
