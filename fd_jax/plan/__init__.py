"""Plans a run: compiles its train step ahead of time, without the TPUs, and reports its needs.

__main__.py (flags) -> experiment.py (config -> task, without weights or data) -> topology.py (the
devices of a slice) -> planning.py -> compiled.py (the real step) -> hlo.py (parses its text) ->
bounds.py (limits) -> advice.py (tries changes that might fit) -> table.py (lines and JSON).
"""
