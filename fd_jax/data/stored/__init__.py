"""Maps of teachers that were computed before a run, and the pictures that belong to them.

`python -m fd_jax.targets` writes them, and a run with `teacher.targets` reads them
(docs/offline_targets.md). `description`: what a folder of targets holds; `codecs`: how a map is
stored; `records`: the bytes of one view; `drawing`: the views of pictures; `replay`: a run's rows.
"""
