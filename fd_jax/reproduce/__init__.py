"""Reproduction of the paper's tables: commands of every cell, their launch, and the results.

`cells` says what a cell and a command are, `paper` has the cells of Tables 1 to 5 and `small` those
of the same grid on a CPU. `launching` runs the commands, `results` collects what they measured and
`page` writes docs/results.md.
"""
