"""Diagnostics of networks: attention, representations and loss landscapes.

`python -m fd_jax.diagnose` measures model folders side by side and draws the paper's figures
(docs/reference.md#diagnostics). The way of the data: `measurement` defines what is measured in one
pass over images, `stream` runs the passes and adds up their sums, `record` is what they end in, and
`draw` and `html` show a record.
"""
