"""Plans a run: compiles its train step ahead of time, without the TPUs, and reports its needs.

__main__.py (flags) -> topology.py (the devices of a slice) -> planning.py: experiment.py (config ->
task, without weights or data) -> duration.py (how long it will take) -> compiled.py (the real step,
in a thread of stopping.py) -> hlo.py (parses its text) -> bounds.py (limits) -> table.py (lines and
JSON); advice.py (settings that make it fit).
"""
