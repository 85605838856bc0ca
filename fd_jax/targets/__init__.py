"""Computes a teacher's maps of fixed views of pictures before a run (docs/offline_targets.md).

`cli` and `flags`: the command; `making`: the pass over the pictures; `shards`: its files, from
which a stopped command goes on; `measuring`: how far stored maps are from those of the teacher;
`principal`: what maps are reduced to.
"""
