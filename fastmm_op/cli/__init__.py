"""The command line's commands, one file each. ``fastmm_op.__main__`` parses and dispatches."""
