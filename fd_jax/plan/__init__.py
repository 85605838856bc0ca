"""Plans a run: compiles its train step for TPUs that are not there, and tells what it needs.

__main__.py (flags) -> experiment.py (config -> task, without weights or data) -> topology.py (chips
that are not there) -> planning.py -> compiled.py (the real step) -> hlo.py (reads its text) ->
bounds.py (limits) -> advice.py (what would fit, tried) -> table.py (lines and JSON).
"""
