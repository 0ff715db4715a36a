"""The cluster config: its sections and keys, the rules between them, and the reader of the YAML file."""
