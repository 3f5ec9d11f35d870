"""The Python functions behind `import arriero`: what the verbs do, with values instead of text. See docs/python.md."""
