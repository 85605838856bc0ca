"""Plans a run: compiles its train step ahead of time, without the TPUs, and says what it needs.

__main__.py (flags) -> experiment.py (config -> task, without weights or data) -> topology.py (the
devices of a slice) -> planning.py -> compiled.py (the real step) -> hlo.py (reads its text) ->
bounds.py (limits) -> advice.py (what would fit, tried) -> table.py (lines and JSON).
"""
