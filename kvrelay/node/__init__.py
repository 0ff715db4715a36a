"""The process around a node's machine, the same for prefill, decode and mixed: engine, messager, sockets, shell."""
