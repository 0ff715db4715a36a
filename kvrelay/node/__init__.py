"""What prefill, decode and mixed nodes have in common.

The process around a node's machine: engine, messager, sockets, shell. And ``prefill_order``, a part of their machines.
"""
